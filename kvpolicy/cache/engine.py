"""The cache of one batch: rows of equal rank in time, tokens in columns, as transformers calls a model.

What is counted lies in the ledger, what is stored in the stores, what was asked in the query log; the engine leads a
forward pass past them in the right order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.cache.columns import Columns
from kvpolicy.cache.compactor import Compactor, Decided
from kvpolicy.cache.ledger import Incoming, Kind, Ledger, RowCounts
from kvpolicy.cache.picture import LayerFacts, Observed, make_view, marked
from kvpolicy.cache.plan import Forward, check_chunk, check_forward, plan_forward, refuse_unplanned
from kvpolicy.cache.queries.log import ROLLBACK, QueryLog, Window
from kvpolicy.cache.queries.observation import Observation
from kvpolicy.cache.rollback import check_window, slots_to_keep, tokens_to_crop
from kvpolicy.cache.store import ArenaStore, Base, RaggedStore, Repacked, Rows
from kvpolicy.cache.store.group import Stores
from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.contracts.ranks import ALONE, Ranks
from kvpolicy.contracts.view import CacheView, LazyViews, Rope
from kvpolicy.errors import CacheStateError
from kvpolicy.policy.policy import Policy

UNOBSERVED_MOST = 96
"""Columns that wait at most before scorers that accumulate something observe them."""


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
        ranks: the other ranks of tensor parallelism, if there are any.
        heads: which KV heads are here, for layers of which some are elsewhere.
    """

    def __init__(
        self,
        policy: Policy,
        groups: Sequence[Sequence[int]],
        num_layers: int,
        ropes: Mapping[int, Rope] | None = None,
        *,
        ranks: Ranks = ALONE,
        heads: Mapping[int, HeadSpan] | None = None,
    ) -> None:
        self.policy = policy
        self.groups = [tuple(g) for g in groups]
        self.num_layers = num_layers
        self.ropes = dict(ropes or {})
        self.ranks, self.heads = ranks, dict(heads or {})
        self.layers = sorted(layer for group in self.groups for layer in group)
        self._re_rotates = any(p.changes == "positions" for p in policy.post)
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next forward pass starts a new sequence."""
        self.ledger: Ledger[int] = Ledger(self.policy, re_rotates=self._re_rotates)
        self.stores = Stores(
            self.groups,
            ragged=self.policy.counts != "equal",
            bound=self.policy.bound,
            states=self.policy.slot_states,
            re_rotates=self._re_rotates,
        )
        self._compactor = Compactor(self.policy, self.ledger, self, self.ranks)
        self._used: list[int] = []  # slots of the stores in use, per row; of a ragged store, those behind its base
        self._last_held: Rows | None = None
        self.facts: dict[int, LayerFacts] = {}
        self.observation = Observation(self.policy, self.ropes)
        self.log = QueryLog(self.policy.observed_queries, feeds_attention=self.observation.active)
        self.modality: Tensor | None = None
        self._columns = Columns()
        self.forward: Forward | None = None

    @property
    def rows(self) -> list[RowCounts]:
        """The counters of the rows."""
        return list(self.ledger.rows.values())

    @property
    def decoding(self) -> bool:
        """Whether the last tokens were decoded, rather than read as a prompt."""
        return any(row.decoding for row in self.ledger.rows.values())

    @property
    def columns(self) -> int:
        """Columns seen, padding included."""
        return self._columns.total

    # -- one forward pass ---------------------------------------------------------------------------------------------

    def open(self, batch: int, columns: int, valid: Tensor | None, device: torch.device, *, kind: Kind) -> Forward:
        """Begin a forward pass: compact the rows that are due, make room, and plan the write.

        Args:
            batch: rows of the pass.
            columns: tokens per row, padding included.
            valid: bool `[B, columns]` on any device, or None when no token is padding.
            device: device of the first layer.
            kind: what the tokens are; the runtime knows.

        Raises:
            CacheStateError: the batch size changed, or the last forward pass did not finish.
            BudgetError, ScoreError: from the policy.
        """
        check_forward(self.forward, len(self.ledger.rows), batch, valid)
        if kind == "prompt":
            check_chunk(self.policy, columns)
        host = None if valid is None or bool(valid.all()) else valid.to("cpu")
        counts = [columns] * batch if host is None else [int(n) for n in host.sum(1).tolist()]
        step = {b: Incoming(count, kind) for b, count in enumerate(counts)}
        if self.ledger.rows:
            self._compact(self.ledger.due(step), max(counts))
        else:
            self.ledger.enter(step)
            self._used = [0] * batch
        # A pass longer than the log can take back ends what may be cropped: what waits is observed now, while the
        # entries that it saw are still what the views show.
        if self.log.unobserved > UNOBSERVED_MOST or columns > ROLLBACK:
            self.observe(leave=0 if columns > ROLLBACK else UNOBSERVED_MOST // 3)
        forward = plan_forward(self.rows, self._used, columns, counts, host, device)
        before = max(self._used)
        self.ledger.advance(step)
        self._used = [used + count for used, count in zip(self._used, counts, strict=True)]
        self._columns.add(columns, host, batch)
        if self.log.active:
            self.log.open(forward.query_positions, forward.query_valid, counts, ragged=host is not None)
        forward.pending = set(self.layers)
        forward.kind = kind
        self.forward = forward
        for store in self.stores.distinct():
            self._make_room(store, before)
        return forward

    def _make_room(self, store: ArenaStore, used: int) -> None:
        assert self.forward is not None
        plan = self.forward.plan_on(store.layout.device)
        self.stores.reserve(store, plan.end, used if store.capacity else 0, decoding=self.forward.kind != "prompt")
        store.append_slots(plan)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys `[B, H, q, D]` and values; return views `[B, H, N, ...]` over all slots in use."""
        forward = self.forward
        if forward is None or layer not in forward.pending:
            refuse_unplanned(forward, layer)
        store = self.stores.get(layer)
        if store is None:
            # Both refuse now, rather than at the first compaction.
            ops.choose_backend(self.policy.backend, keys)
            if layer in self.heads:
                self.heads[layer].check(layer, keys.shape[1])
            store = self.stores.make(layer, keys, values)
            self._make_room(store, 0)
        store.layout.check(layer, keys)
        if forward.shifted:
            keys = ops.rotate(keys, self.ropes[layer], -self._shifts(keys.device)[:, None, None])
        forward.pending.discard(layer)
        return store.append(layer, keys, values, forward.plan_on(store.layout.device))

    def ragged_base(self, layer: int) -> Base | None:
        """Return the ragged entries that a layer's attention reads beside the slots that `append` returned."""
        store = self.stores[layer]
        return store.base(layer) if isinstance(store, RaggedStore) else None

    def turn_queries(self, layer: int, queries: Tensor) -> Tensor:
        """Rotate queries `[B, Hq, q, D]` to the positions that the cached keys are rotated to."""
        if not self._re_rotates or not any(row.shift for row in self.ledger.rows.values()):
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

    def settle(self, *, every: bool = False) -> None:
        """Run the compactions that are due now, as the next decode step would; with `every`, of all above budget."""
        if self.forward is not None and not self.forward.pending:
            step = dict.fromkeys(self.ledger.rows, Incoming(1))
            self._compact(self.ledger.above() if every else self.ledger.due(step))

    def _compact(self, due: Sequence[int], incoming: int = 1) -> None:
        """Compact the rows that are due before so many tokens."""
        if not due:
            return
        left = self.log.left_after(0, len(self._used))
        check_window(self.rows, due, left, self.policy.observed_queries, self.policy.name)
        if self.observation.active:
            self.observe()
        self._compactor.run(due)
        self.stores.shrink(max(self._used), incoming)

    def together(self, rows: Sequence[int]) -> list[list[list[int]]]:
        """Return all rows in one part if all are due, else one by one: a part of a batch is a slice without a copy.

        A ragged base is packed for the whole batch, so its parts move together.
        """
        parts = [list(rows)] if len(rows) == len(self._used) else [[b] for b in rows]
        return [parts] if self.stores.ragged else [[part] for part in parts]

    def views(self, rows: Sequence[int], budget: Sequence[int]) -> Sequence[CacheView]:
        """Return what components may see of neighbouring rows in a compaction, one view per layer."""
        window, part = self.log.window(), slice(rows[0], rows[-1] + 1)

        def make(layer: int) -> CacheView:
            return self.view(layer, part, window, budget)

        return LazyViews(make, self.layers) if self.stores.ragged else [make(layer) for layer in self.layers]

    def keep(self, decided: Sequence[Decided[int]]) -> dict[int, int]:
        """Move what was decided for a part, or for all parts of a ragged cache; return what the rows hold now."""
        if self.stores.ragged:
            return self._repack(decided)
        (one,) = decided
        rows = self.held(slice(one.rows[0], one.rows[-1] + 1), [self.ledger.entries(row) for row in one.rows])
        for i, layer in enumerate(self.layers):
            self.stores[layer].write(layer, rows, one.changes(i))
        counts = dict(zip(self.layers, one.counts, strict=True))
        left = self.stores.keep(rows, dict(zip(self.layers, one.kept, strict=True)), counts)
        for row, length in zip(one.rows, left.lengths, strict=True):
            self._used[row] = length
        return dict(zip(one.rows, left.lengths, strict=True))

    def _repack(self, decided: Sequence[Decided[int]]) -> dict[int, int]:
        """Move all rows' entries to new bases and empty the tails; rows that are not due keep everything."""

        def of_layer(layer: int) -> list[Repacked]:
            i = self.layers.index(layer)
            parts = [slice(d.rows[0], d.rows[-1] + 1) for d in decided]
            return [Repacked(p, d.kept[i], d.counts[i], d.changes(i)) for p, d in zip(parts, decided, strict=True)]

        left = self.stores.repack(self.held(slice(None)), of_layer)
        self._used = [0] * len(self._used)
        due = [row for d in decided for row in d.rows]
        for row in set(range(len(self._used))).difference(due):
            self.ledger.repacked(row)
        return {row: left.lengths[row] for row in due}

    def held(self, part: slice, budget: Sequence[int] | None = None) -> Rows:
        """Return what stores and views are told of some rows; one object, and its tensors, while nothing changes."""
        some = self.rows[part]
        rows = Rows.of(
            range(len(self._used))[part], self._used[part], prompt_length=[row.prompt for row in some],
            seen=[row.seen for row in some], compaction=[row.compactions for row in some],
            turned_back=[row.shift for row in some], **({} if budget is None else {"budget": budget}),
        )  # fmt: skip
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
            extras["modality"] = marked(self._columns.by_position(self.modality, len(self._used))[part], slots)
        return make_view(
            slots, rows, facts,
            layer=layer, num_layers=self.num_layers, rope=self.ropes.get(layer), observed=observed, extras=extras,
            heads=self.heads.get(layer),
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
        everyone = slice(0, len(self._used))
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
        """Return how many tokens each row would lose with the last `columns` columns; see `tokens_to_crop`."""
        unobserved = self.log.unobserved if self.observation.active else None
        return tokens_to_crop(self.rows, self._columns, columns, unobserved=unobserved, policy=self.policy.name)

    def crop(self, columns: int) -> None:
        """Forget the last `columns` columns; possible back to the last compaction. Raises as `check_crop`."""
        for row, count in enumerate(self.check_crop(columns)):
            self.ledger.retract(row, count)
            self._used[row] -= count
        self._columns.cut(columns)
        self.log.crop(columns)

    def hide(self, past: Tensor) -> None:
        """Drop tokens that were real when they came and are padding in the mask of a later turn.

        The tokens behind them move down in position, as the model's own position ids do. Their keys keep the rotation
        that they have: from then on it is stored apart from their position.

        Args:
            past: bool `[B, columns]` on the CPU, the mask of everything seen so far.

        Raises:
            CacheStateError: padding has become real, the row has been compacted since, or an accumulating scorer has
                observed the queries of hidden tokens and cannot forget them.
        """
        known = self._columns.valid(len(self._used))
        if torch.equal(known, past):
            return
        observed = self.columns - self.log.unobserved if self.observation.active else 0
        hidden = slots_to_keep(self.rows, self._used, known, past, observed=observed, policy=self.policy.name)
        for row, (slots, visible) in hidden.items():
            with ops.using_backend(self.policy.backend):
                self.stores.drop(row, slots)
            prompt = self.rows[row].prompt
            self.ledger.hide(row, int((~visible).sum()), int((~visible[:prompt]).sum()))
            self._used[row] = slots.numel()
            self.log.hide(row, visible)
        self._columns.replace(past)

    def take_rows(self, index: Tensor) -> None:
        """Reorder, repeat or select rows; `index` int64 `[B']`. Raises CacheStateError for rows that there are not."""
        chosen = index.tolist() if index.dim() == 1 else []
        if not self._used:
            return  # nothing has come yet
        if not (chosen and all(0 <= b < len(self._used) for b in chosen)):
            raise CacheStateError(
                f"the cache holds {len(self._used)} rows and cannot go on with rows {str(chosen)[:60]}; "
                f"name at least one from 0 to {len(self._used) - 1}."
            )
        self.ledger.take(dict(enumerate(chosen)))
        self._used = [self._used[b] for b in chosen]
        self.stores.take(index)
        self.log.rows(index)
        self.observation.take(index)
        if self.modality is not None:
            self.modality = self.modality.index_select(0, index.to(self.modality.device))
        self._columns.take(index)

    def clone(self) -> Engine:
        """Return an independent copy."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.ledger, twin._used = self.ledger.clone(), list(self._used)
        twin.stores, twin.facts = self.stores.clone(), dict(self.facts)
        twin._compactor = Compactor(self.policy, twin.ledger, twin, self.ranks)
        twin.log, twin._columns = self.log.clone(), self._columns.clone()
        twin.observation = self.observation.clone(torch.arange(len(self._used)))
        return twin

    def _shifts(self, device: torch.device) -> Tensor:
        return torch.tensor([row.shift for row in self.ledger.rows.values()], device=device)
