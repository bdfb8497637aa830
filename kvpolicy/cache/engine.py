"""The eviction engine: counters, when to compact, and what the components get to see. The only mutable state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.cache.picture import LayerFacts, Observed, make_view, marked
from kvpolicy.cache.plan import Forward, check_forward, plan_forward
from kvpolicy.cache.queries.log import QueryLog, Window
from kvpolicy.cache.queries.observation import Observation
from kvpolicy.cache.rollback import check_window, slots_to_keep, tokens_to_crop
from kvpolicy.cache.rows import Columns, Row
from kvpolicy.cache.store import ArenaStore, Base, RaggedStore, Rows
from kvpolicy.cache.store.group import Stores
from kvpolicy.contracts.components import Component, Counters
from kvpolicy.contracts.view import CacheView, LazyViews, Rope
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.policy.policy import Policy
from kvpolicy.types import KeepIndices

_UNOBSERVED_MOST = 96  # columns that wait at most before they are observed


class Engine:
    """Drives one policy over the evictable layers of one model, for the rows of one batch.

    A forward pass is `open` (compact what is due, plan the write), then `append` and `record` per layer. A compaction
    that has become due runs at the start of the next forward pass, or in `settle`; nothing that a policy can see
    happens in between, and a speculative step can still be cropped.

    Args:
        policy: what to do.
        groups: layers that share shape and device, as transformers counts them.
        num_layers: layers of the whole model.
        ropes: rotary embedding per layer, for policies that need it.
    """

    def __init__(
        self, policy: Policy, groups: Sequence[Sequence[int]], num_layers: int, ropes: Mapping[int, Rope] | None = None
    ) -> None:
        self.policy = policy
        self.groups = [tuple(g) for g in groups]
        self.num_layers = num_layers
        self.ropes = dict(ropes or {})
        self.layers = sorted(layer for group in self.groups for layer in group)
        self._re_rotates = any(p.changes == "positions" for p in policy.post)
        self._fixed = policy.budget.tokens
        self._remembering = [c for c in policy.components if type(c).remember is not Component.remember]
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next forward pass starts a new sequence."""
        self.rows: list[Row] = []
        self.stores = Stores(
            self.groups,
            ragged=self.policy.counts != "equal",
            bound=self.policy.bound,
            states=self.policy.slot_states,
            re_rotates=self._re_rotates,
        )
        self._last_held: Rows | None = None
        self.facts: dict[int, LayerFacts] = {}
        self.observation = Observation(self.policy, self.ropes)
        self.log = QueryLog(self.policy.observed_queries, feeds_attention=self.observation.active)
        self.modality: Tensor | None = None
        self._columns = Columns()
        self.decoding = False
        self.forward: Forward | None = None
        self._cropped = False

    @property
    def columns(self) -> int:
        """Columns seen, padding included."""
        return self._columns.total

    # -- one forward pass ---------------------------------------------------------------------------------------------

    def open(self, batch: int, columns: int, valid: Tensor | None, device: torch.device, *, prefill: bool) -> Forward:
        """Begin a forward pass: compact the rows that are due, make room, and plan the write.

        Args:
            batch: rows of the pass.
            columns: tokens per row, padding included.
            valid: bool `[B, columns]` on any device, or None when no token is padding.
            device: device of the first layer.
            prefill: the runtime knows that this pass belongs to a prompt.

        Raises:
            CacheStateError: the batch size changed, or the last forward pass did not finish.
            BudgetError, ScoreError: from the policy.
        """
        check_forward(self.forward, len(self.rows), batch, valid)
        is_prefill = prefill or self.columns == 0 or (columns > 1 and not self._cropped)
        chunk = self.policy.prefill_chunk
        if is_prefill and chunk is not None and columns > chunk and self.policy.phase != "decode":
            raise UnsupportedError(
                f"policy {self.policy.name!r} compresses the prompt in chunks of {chunk} tokens, but {columns} came at "
                "once; call cache.prefill(input_ids, attention_mask) before generate(), or leave out prefill_chunk."
            )
        if not self.rows:
            self.rows = [Row() for _ in range(batch)]
        host = None if valid is None or bool(valid.all()) else valid.to("cpu")
        counts = [columns] * batch if host is None else [int(n) for n in host.sum(1).tolist()]
        self.compact_due(counts)
        if self.log.unobserved > _UNOBSERVED_MOST or columns > self.log.rollback:
            self.observe(leave=0 if columns > self.log.rollback else _UNOBSERVED_MOST // 3)
        self.decoding = not is_prefill
        self._cropped = False
        forward = plan_forward(self.rows, columns, counts, host, device)
        for row, count in zip(self.rows, counts, strict=True):
            row.resident += count
            row.seen += count
            row.peak = max(row.peak, row.resident)
            row.decoded = row.decoded or not is_prefill
            if not row.decoded:
                row.prompt = row.seen
        self._columns.add(columns, host, batch)
        if self.log.active:
            self.log.open(forward.query_positions, forward.query_valid, counts, ragged=host is not None)
        forward.pending = set(self.layers)
        self.forward = forward
        for store in self.stores.distinct():
            self._make_room(store)
        return forward

    def _make_room(self, store: ArenaStore) -> None:
        assert self.forward is not None
        plan = self.forward.plan_on(store.layout.device)
        used = max(row.tail for row in self.rows) if store.capacity else 0
        self.stores.reserve(store, plan.end, used, decoding=self.decoding)
        store.append_slots(plan)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys `[B, H, q, D]` and values; return views `[B, H, N, ...]` over all slots in use."""
        forward = self.forward
        if forward is None or layer not in forward.pending:
            raise UnsupportedError(
                "this cache is not attached to the model that uses it, or the attention mask is a finished 4-D "
                "one; call the model that the cache was made for, inside the cache's `with` block, with a 2-D mask."
            )
        store = self.stores.get(layer)
        if store is None:
            ops.choose_backend(self.policy.backend, keys)  # refuses now, rather than at the first compaction
            store = self.stores.make(layer, keys, values)
            self._make_room(store)
        layout = store.layout
        if layout.dtype != keys.dtype or layout.device != keys.device:
            raise UnsupportedError(
                f"layer {layer} was given {keys.dtype} keys on {keys.device} but its cache is {layout.dtype} on "
                f"{layout.device}; keep dtype and device of a model while a cache is in use."
            )
        if keys.shape[1] != layout.heads or keys.shape[3] != layout.key_dim:
            raise UnsupportedError(
                f"layer {layer} has {keys.shape[1]} KV heads of size {keys.shape[3]}, unlike the layers "
                "that it is grouped with."
            )
        if forward.shifted:
            keys = ops.rotate(keys, self.ropes[layer], -self._shifts(keys.device)[:, None, None])
        forward.pending.discard(layer)
        return store.append(layer, keys, values, forward.plan_on(layout.device))

    def ragged_base(self, layer: int) -> Base | None:
        """Return the ragged entries that a layer's attention reads beside the slots that `append` returned."""
        store = self.stores[layer]
        return store.base(layer) if isinstance(store, RaggedStore) else None

    def turn_queries(self, layer: int, queries: Tensor) -> Tensor:
        """Rotate queries `[B, Hq, q, D]` to the positions that the cached keys are rotated to."""
        if not self._re_rotates or not any(row.shift for row in self.rows):
            return queries
        return ops.rotate(queries, self.ropes[layer], -self._shifts(queries.device)[:, None, None])

    def record(self, layer: int, queries: Tensor, facts: LayerFacts) -> None:
        """Keep what a policy needs of one layer's queries `[B, Hq, q, D]`, as the model made them."""
        self.facts[layer] = facts
        if not self.log.active:
            return
        if self.observation.active:
            early = queries.shape[2] - self.log.records[-1].width
            if early > 0:
                assert self.forward is not None
                positions, valid = self.forward.query_positions[:, :early], self.forward.query_valid[:, :early]
                self._feed(layer, queries[:, :, :early], positions, valid)
        self.log.put(layer, queries)

    # -- compaction ---------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Run the compactions that are due now, as the next decode step would."""
        if self.forward is not None and not self.forward.pending:
            self.compact_due([1] * len(self.rows))

    def compact_due(self, incoming: Sequence[int]) -> None:
        """Compact every row whose trigger fires before `incoming` more tokens."""
        if self.forward is None or self.policy.phase not in ("both", "decode" if self.decoding else "prefill"):
            return
        due = [b for b, (row, new) in enumerate(zip(self.rows, incoming, strict=True)) if new and self._fires(row, new)]
        if not due:
            return
        left = self.log.left_after(0, len(self.rows))
        check_window(self.rows, due, left, self.policy.observed_queries, self.policy.name)
        if self.observation.active:
            self.observe()
        parts = [slice(0, len(self.rows))] if len(due) == len(self.rows) else [slice(b, b + 1) for b in due]
        if self.stores.ragged:
            self._compact_ragged(parts)
            return
        with ops.using_backend(self.policy.backend):
            for part in parts:
                self._compact(part)
        self.stores.shrink(max(row.resident for row in self.rows), max(incoming))

    def _fires(self, row: Row, incoming: int) -> bool:
        entries = self._fixed or self.policy.entries(row.seen, row.prompt)
        return row.resident > entries and self.policy.trigger.fires(
            Counters(row.resident, entries, incoming, row.seen, row.prompt)
        )

    def _decide(self, part: slice, window: Window | None) -> tuple[list[int], Sequence[CacheView], list[KeepIndices]]:
        """Return the budgets of some rows, the views of all layers, and what the policy keeps of them."""
        budget = [self.policy.entries(row.seen, row.prompt) for row in self.rows[part]]
        make = partial(self.view, part=part, window=window, budget=budget)
        views = LazyViews(make, self.layers) if self.stores.ragged else [make(layer) for layer in self.layers]
        return budget, views, self.policy.decide(views, budget).kept

    def _compact(self, part: slice) -> None:
        window = self.log.window()
        budget, views, keeps = self._decide(part, window)
        rows = self.held(part, budget)
        for i, (layer, kept) in enumerate(zip(self.layers, keeps, strict=True)):
            self.stores[layer].write(layer, rows, self._changes(views, i, kept))
        left = self.stores.keep(rows, dict(zip(self.layers, keeps, strict=True)))
        for row, entries in zip(self.rows[part], left.lengths, strict=True):
            row.resident = entries
            self._note(row)

    def _compact_ragged(self, parts: Sequence[slice]) -> None:
        """Decide for the rows that are due, then move all rows' entries to new bases and empty the tails."""
        window = self.log.window()
        decided = [(part, *self._decide(part, window)) for part in parts]
        for i, layer in enumerate(self.layers):
            store = self.stores[layer]
            assert isinstance(store, RaggedStore)
            made = [(part, keeps[i], self._changes(views, i, keeps[i])) for part, _, views, keeps in decided]
            store.repack(layer, self.held(slice(None)), made)
        for store in self.stores.distinct():
            store.resize(0, 0)
        counts = [self.stores[layer].entries(layer, [0] * len(self.rows)) for layer in self.layers]
        heads = sum(self.stores[layer].layout.heads for layer in self.layers)
        for row, total in zip(self.rows, zip(*counts, strict=True), strict=True):
            row.base = row.resident = -(-sum(total) // heads)
            row.floor = row.seen
        for part in parts:
            for row in self.rows[part]:
                self._note(row)

    def _changes(self, views: Sequence[CacheView], index: int, kept: KeepIndices) -> dict[str, Tensor]:
        """Return what is replaced in a layer before its entries move: remembered slot state, and post-operations."""
        if not (self._remembering or self.policy.post):
            return {}
        view = views[index]
        changes = {f"state.{name}": t for c in self._remembering for name, t in c.remember(view).items()}
        for post in self.policy.post:
            made: Any = post.apply(view, kept)
            view = replace(view, **made)
            changes |= made
        return changes

    def _note(self, row: Row) -> None:
        row.compactions += 1
        row.floor = row.seen
        if self._re_rotates:
            row.shift = row.seen - row.resident

    def held(self, part: slice, budget: Sequence[int] | None = None) -> Rows:
        """Return what stores and views are told of some rows; one object, and its tensors, while nothing changes."""
        some = self.rows[part]
        numbers = {
            "prompt_length": [row.prompt for row in some],
            "seen": [row.seen for row in some],
            "compaction": [row.compactions for row in some],
        }
        if budget is not None:
            numbers["budget"] = list(budget)
        rows = Rows.of(range(len(self.rows))[part], [row.tail for row in some], **numbers)
        if rows != self._last_held:
            self._last_held = rows
        assert self._last_held is not None
        return self._last_held

    def view(
        self, layer: int, part: slice, window: Window | None = None, budget: Sequence[int] | None = None
    ) -> CacheView:
        """Return what components may see of one layer, for the rows `part`."""
        rows, facts = self.held(part, budget), self.facts[layer]
        slots = self.stores[layer].read(layer, rows)
        observed = None
        if window is not None:
            queries = self.turn_queries(layer, self.log.gather(layer, window))[part]
            observed = Observed(queries.unflatten(1, (slots.keys.shape[1], facts.groups)), window, part)
        extras = self.observation.extras(layer, part)
        if self.modality is not None:
            extras["modality"] = marked(self._columns.by_position(self.modality, len(self.rows))[part], slots)
        return make_view(
            slots, rows, facts,
            layer=layer, num_layers=self.num_layers, rope=self.ropes.get(layer), observed=observed, extras=extras,
        )  # fmt: skip

    # -- observation --------------------------------------------------------------------------------------------------

    def observe(self, leave: int = 0) -> None:
        """Feed waiting queries to the scorers that accumulate attention, all but about the last `leave` columns."""
        waiting = self.log.unobserved
        for record in self.log.records:
            if not record.unobserved or waiting <= leave:
                continue
            first = record.width - record.unobserved
            for layer in self.layers:
                queries = record.queries[layer][:, :, first:]
                self._feed(layer, queries, record.positions[:, first:], record.valid[:, first:])
            waiting -= record.unobserved
            record.unobserved = 0

    def _feed(self, layer: int, queries: Tensor, positions: Tensor, valid: Tensor) -> None:
        store, shape = self.stores[layer], (self.stores[layer].layout.heads, self.facts[layer].groups)
        everyone = slice(0, len(self.rows))
        self.observation.feed(
            layer,
            queries.unflatten(1, shape),
            self.turn_queries(layer, queries).unflatten(1, shape),
            positions.to(queries.device),
            valid.to(queries.device),
            lambda: self.view(layer, everyone),
            lambda name, tensor: store.write(layer, self.held(everyone), {f"state.{name}": tensor}),
        )

    # -- rows and rollback --------------------------------------------------------------------------------------------

    def check_crop(self, columns: int) -> list[int]:
        """Return how many tokens each row would lose with the last `columns` columns.

        Raises:
            CacheStateError: a row has been compacted since, or has observed attention that it cannot forget.
        """
        unobserved = self.log.unobserved if self.observation.active else None
        return tokens_to_crop(self.rows, self._columns, columns, unobserved=unobserved, policy=self.policy.name)

    def crop(self, columns: int) -> None:
        """Forget the last `columns` columns; possible back to the last compaction. Raises as `check_crop`."""
        for row, count in zip(self.rows, self.check_crop(columns), strict=True):
            row.resident -= count
            row.seen -= count
            row.prompt = min(row.prompt, row.seen)
        if all(row.seen == row.prompt for row in self.rows):
            self.decoding = False
            for row in self.rows:
                row.decoded = False
        self._columns.cut(columns)
        self.log.crop(columns)
        self._cropped = True

    def hide(self, past: Tensor) -> None:
        """Drop tokens that were real when they came and are padding in the mask of a later turn.

        Args:
            past: bool `[B, columns]` on the CPU, the mask of everything seen so far.

        Raises:
            CacheStateError: padding has become real, or the row has been compacted since.
        """
        known = self._columns.valid(len(self.rows))
        if torch.equal(known, past):
            return
        for b, slots in slots_to_keep(self.rows, known, past).items():
            self.observe()
            for store in self.stores.distinct():
                index = slots.to(store.layout.device).expand(1, store.layout.heads, -1)
                lengths = torch.full(index.shape[:2], slots.numel(), device=index.device)
                with ops.using_backend(self.policy.backend):
                    for layer in store.layers:
                        store.compact(layer, slice(b, b + 1), KeepIndices(index, lengths))
            row = self.rows[b]
            row.resident, row.floor = slots.numel(), row.seen
        self._columns.replace(past)

    def take_rows(self, index: Tensor) -> None:
        """Reorder, repeat or select rows; `index` int64 `[B']`. Raises CacheStateError for rows that there are not."""
        chosen = index.tolist() if index.dim() == 1 else []
        if self.rows and not (chosen and all(0 <= b < len(self.rows) for b in chosen)):
            raise CacheStateError(
                f"the cache holds {len(self.rows)} rows and cannot go on with rows {str(chosen)[:60]}; "
                f"name at least one from 0 to {len(self.rows) - 1}."
            )
        self.rows = [replace(self.rows[b]) for b in chosen]
        self.stores.take(index)
        self.log.rows(index)
        self.observation.take(index)
        if self.modality is not None:
            self.modality = self.modality.index_select(0, index.to(self.modality.device))
        self._columns.take(index)

    def clone(self) -> Engine:
        """Return an independent copy."""
        twin = object.__new__(Engine)
        twin.__dict__.update(self.__dict__)
        twin.stores, twin.facts = self.stores.clone(), dict(self.facts)
        twin.rows = [replace(row) for row in self.rows]
        twin.log, twin._columns = self.log.clone(), self._columns.clone()
        twin.observation = self.observation.clone(torch.arange(len(self.rows)))
        return twin

    def _shifts(self, device: torch.device) -> Tensor:
        return torch.tensor([row.shift for row in self.rows], device=device)
