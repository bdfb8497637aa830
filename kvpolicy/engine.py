"""The eviction engine: counters, when to compact, and what the components get to see. The only mutable state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.components import Counters
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.plan import Forward, plan_forward
from kvpolicy.policy import Policy
from kvpolicy.query_log import QueryLog, Window
from kvpolicy.rows import Columns, Row
from kvpolicy.stores import DenseStore, Shape
from kvpolicy.types import KeepIndices
from kvpolicy.view import CacheView, Rope

_OBSERVE_BLOCK = 32  # queries per call of `observe_attention`: bounds the weights to [B, H, G, 32, N]
_UNOBSERVED_MOST = 96  # columns that wait at most before they are observed
_EAGER_SLOTS = 4096  # a bounded policy up to this size gets its whole arena at once


@dataclass
class LayerFacts:
    """What an attention call tells about its layer."""

    groups: int
    scale: float
    softcap: float | None = None
    attention_sinks: Tensor | None = None


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
        self._observers = [c for c in policy.components if "attention" in c.needs]
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next forward pass starts a new sequence."""
        self.rows: list[Row] = []
        self.stores: dict[int, DenseStore] = {}
        self.facts: dict[int, LayerFacts] = {}
        self.log = QueryLog(self.policy.observed_queries, feeds_attention=bool(self._observers))
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
        if self.forward is not None and self.forward.pending:
            raise CacheStateError(
                f"the last forward pass stopped before layer {min(self.forward.pending)}, so the cache is incomplete; "
                "call reset() or use a new cache."
            )
        if self.rows and batch != len(self.rows):
            raise CacheStateError(
                f"the cache holds {len(self.rows)} rows but the forward pass has {batch}; "
                "use one cache per batch, or batch_select_indices() first."
            )
        if valid is not None and valid.shape[0] != batch:
            raise CacheStateError(
                f"attention_mask has {valid.shape[0]} rows but the forward pass has {batch}; give one row for each."
            )
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
        for store in self._distinct_stores():
            self._reserve(store, forward.plan.end)
            store.append_slots(forward.plan_on(store.shape.device))
        return forward

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
            store = self._make_store(layer, Shape.of(keys, values))
        shape = store.shape
        if shape.dtype != keys.dtype or shape.device != keys.device:
            raise UnsupportedError(
                f"layer {layer} was given {keys.dtype} keys on {keys.device} but its cache is {shape.dtype} on "
                f"{shape.device}; keep dtype and device of a model while a cache is in use."
            )
        if keys.shape[1] != shape.heads or keys.shape[3] != shape.key_dim:
            raise UnsupportedError(
                f"layer {layer} has {keys.shape[1]} KV heads of size {keys.shape[3]}, unlike the layers "
                "that it is grouped with."
            )
        if forward.shifted:
            keys = ops.rotate(keys, self.ropes[layer], -self._shifts(keys.device)[:, None, None])
        forward.pending.discard(layer)
        return store.append(layer, keys, values, forward.plan_on(shape.device))

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
        if self._observers:
            record = self.log.records[-1]
            early = queries.shape[2] - record.width
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
        self._check_window(due)
        if self._observers:
            self.observe()
        parts = [slice(0, len(self.rows))] if len(due) == len(self.rows) else [slice(b, b + 1) for b in due]
        for part in parts:
            self._compact(part)
        longest = max(row.resident for row in self.rows)
        bound = self.policy.bound
        for store in self._distinct_stores():
            if bound is not None and store.capacity > bound >= longest + max(incoming):
                store.resize(bound, longest)

    def _check_window(self, due: Sequence[int]) -> None:
        """Refuse to score with fewer queries than a policy looks at, which a deep crop may have left for some steps."""
        wanted, left = self.policy.observed_queries, self.log.left_after(0, len(self.rows))
        for b in due:
            if left[b] < min(wanted, self.rows[b].seen):
                raise CacheStateError(
                    f"policy {self.policy.name!r} looks at the last {wanted} queries, but a crop has left only "
                    f"{left[b]} of them; decode {wanted - left[b]} more tokens one by one before giving many at once, "
                    "or crop less."
                )

    def _fires(self, row: Row, incoming: int) -> bool:
        entries = self._fixed or self.policy.entries(row.seen, row.prompt)
        return row.resident > entries and self.policy.trigger.fires(
            Counters(row.resident, entries, incoming, row.seen, row.prompt)
        )

    def _compact(self, part: slice) -> None:
        rows = self.rows[part]
        budget = [self.policy.entries(row.seen, row.prompt) for row in rows]
        window = self.log.window()
        views = [self.view(layer, part, window) for layer in self.layers]
        keeps = self.policy.select(views, budget)
        for layer, kept in zip(self.layers, keeps, strict=True):
            for post in self.policy.post:
                self._write(layer, part, post.apply(self.view(layer, part, window), kept))
            self.stores[layer].compact(layer, part, kept)
        for row, entries in zip(rows, budget, strict=True):
            row.resident = min(row.resident, entries)
            row.compactions += 1
            row.floor = row.seen
            if self._re_rotates:
                row.shift = row.seen - row.resident

    def _write(self, layer: int, part: slice, changes: Mapping[str, Tensor]) -> None:
        store = self.stores[layer]
        arenas = {"keys": store.keys, "values": store.values, "rope_positions": store.rope_positions}
        for name, tensor in changes.items():
            arenas[name][store.index[layer], part, :, : tensor.shape[2]].copy_(tensor)

    def view(self, layer: int, part: slice, window: Window | None = None) -> CacheView:
        """Return what components may see of one layer, for the rows `part`."""
        store, rows, facts = self.stores[layer], self.rows[part], self.facts[layer]
        i, end = store.index[layer], max(row.resident for row in self.rows[part])
        device = store.shape.device
        resident = torch.tensor([row.resident for row in rows], device=device)
        valid = (torch.arange(end, device=device) < resident[:, None])[:, None].expand(-1, store.shape.heads, -1)
        queries = None
        if window is not None:
            flat = self.turn_queries(layer, self.log.gather(layer, window))[part]
            queries = flat.unflatten(1, (store.shape.heads, facts.groups))
        return CacheView(
            keys=store.keys[i, part, :, :end],
            values=store.values[i, part, :, :end],
            positions=store.positions[i, part, :, :end],
            valid=valid,
            scale=facts.scale,
            layer_idx=layer,
            num_layers=self.num_layers,
            prompt_length=torch.tensor([row.prompt for row in rows], device=device),
            seen=torch.tensor([row.seen for row in rows], device=device),
            compaction=torch.tensor([row.compactions for row in rows], device=device),
            queries=queries,
            query_positions=None if window is None else window.positions[part].to(device),
            query_valid=None if window is None else window.valid[part].to(device),
            state=MappingProxyType({name: t[i, part, :, :end] for name, t in store.state.items()}),
            softcap=facts.softcap,
            attention_sinks=facts.attention_sinks,
            rope=self.ropes.get(layer),
            rope_positions=store.rope_positions[i, part, :, :end],
        )

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
        store, facts = self.stores[layer], self.facts[layer]
        queries = self.turn_queries(layer, queries).unflatten(1, (store.shape.heads, facts.groups))
        positions, valid = positions.to(queries.device), valid.to(queries.device)
        for start in range(0, queries.shape[3], _OBSERVE_BLOCK):
            view = self.view(layer, slice(0, len(self.rows)))
            block = slice(start, start + _OBSERVE_BLOCK)
            weights = ops.attention_weights(
                queries[:, :, :, block], positions[:, block], valid[:, block], view.keys, view.positions, view.valid,
                scale=view.scale, softcap=view.softcap, attention_sinks=view.attention_sinks,
            )  # fmt: skip
            for component in self._observers:
                for name, tensor in component.observe_attention(view, weights).items():  # type: ignore[attr-defined]
                    store.state[name][store.index[layer], :, :, : tensor.shape[2]].copy_(tensor)

    # -- rows and rollback --------------------------------------------------------------------------------------------

    def check_crop(self, columns: int) -> list[int]:
        """Return how many tokens each row would lose with the last `columns` columns.

        Raises:
            CacheStateError: a row has been compacted since, or has observed attention that it cannot forget.
        """
        if columns > self.columns:
            raise CacheStateError(f"crop: {columns} tokens are more than the {self.columns} that the cache has seen.")
        counts = self._columns.tokens_in_last(columns, len(self.rows))
        for row, count in zip(self.rows, counts, strict=True):
            if row.seen - count < row.floor:
                raise CacheStateError(
                    f"crop: {columns} tokens back lies before the last compaction, which was at token {row.floor} of "
                    f"{row.seen}; crop at most {row.seen - row.floor} tokens, or fork() the cache before going on."
                )
        if self._observers and columns > self.log.unobserved:
            raise CacheStateError(
                f"crop: the accumulated attention of policy {self.policy.name!r} can be rolled back by "
                f"{self.log.unobserved} tokens at present, not by {columns}; fork() the cache before going on."
            )
        return counts

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
        if bool((past & ~known).any()):
            raise CacheStateError(
                "attention_mask shows tokens that were padding before; keep the mask of earlier turns."
            )
        for b, row in enumerate(self.rows):
            if torch.equal(known[b], past[b]):
                continue
            if row.compactions or row.resident != int(known[b].sum()):
                raise CacheStateError(
                    f"attention_mask hides tokens of row {b} that were real before, and the row has been compacted "
                    "since; give rows that end at different times a cache each."
                )
            self.observe()
            slots = past[b][known[b]].nonzero()[:, 0]
            for store in self._distinct_stores():
                index = slots.to(store.shape.device).expand(1, store.shape.heads, -1)
                lengths = torch.full(index.shape[:2], slots.numel(), device=index.device)
                for layer in store.layers:
                    store.compact(layer, slice(b, b + 1), KeepIndices(index, lengths))
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
        for store in self._distinct_stores():
            store.rows(index)
        self.log.rows(index)
        self._columns.take(index)

    def clone(self) -> Engine:
        """Return an independent copy."""
        twin = object.__new__(Engine)
        twin.__dict__.update(self.__dict__)
        copies = {id(store): store.clone() for store in self._distinct_stores()}
        twin.stores = {layer: copies[id(store)] for layer, store in self.stores.items()}
        twin.rows = [replace(row) for row in self.rows]
        twin.log, twin._columns = self.log.clone(), self._columns.clone()
        twin.facts = dict(self.facts)
        return twin

    def _shifts(self, device: torch.device) -> Tensor:
        return torch.tensor([row.shift for row in self.rows], device=device)

    # -- stores -------------------------------------------------------------------------------------------------------

    def _distinct_stores(self) -> list[DenseStore]:
        return list({id(store): store for store in self.stores.values()}.values())

    def _make_store(self, layer: int, shape: Shape) -> DenseStore:
        group = next(g for g in self.groups if layer in g)
        store = DenseStore(group, shape, self.policy.slot_states, re_rotates=self._re_rotates)
        for member in group:
            self.stores[member] = store
        assert self.forward is not None
        self._reserve(store, self.forward.plan.end)
        store.append_slots(self.forward.plan_on(shape.device))
        return store

    def _reserve(self, store: DenseStore, needed: int) -> None:
        """Grow so that `needed` slots fit: a bounded policy at once to its bound, others geometrically."""
        if needed <= store.capacity:
            return
        used = max(row.resident for row in self.rows) if store.capacity else 0
        bound = self.policy.bound
        if bound is not None and needed <= bound:
            grown = max(needed + needed // 2, _EAGER_SLOTS)
            capacity = min(bound, grown)
        elif bound is not None and not self.decoding:
            capacity = needed + 1  # a long prompt: it shrinks to the bound after its first compaction
        else:
            capacity = needed + max(needed // 2, 64)
        store.resize(capacity, min(used, store.capacity))
