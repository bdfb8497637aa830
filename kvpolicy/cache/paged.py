"""The cache of a paged engine: requests that come and go, whose tokens arrive packed.

Beside `kvpolicy.cache.engine`, which serves rectangular batches. Both count with the same ledger and compact with the
same compactor; here the engine's scheduler owns the blocks and runs a ledger of its own over the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.cache.compactor import Compactor, Decided
from kvpolicy.cache.entering import NEED
from kvpolicy.cache.ledger import Incoming, Ledger
from kvpolicy.cache.picture import LayerFacts, Observed, make_view
from kvpolicy.cache.queries.log import Window
from kvpolicy.cache.queries.observation import Observation
from kvpolicy.cache.queries.ring import QueryRing, waiting_of
from kvpolicy.cache.store.packed import Packed
from kvpolicy.cache.store.paged import PagedStore
from kvpolicy.cache.store.protocol import RowId, Rows, SlotTensors
from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.contracts.ranks import ALONE, Ranks
from kvpolicy.contracts.view import CacheView, LazyViews, Rope
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.policy.policy import Policy

_WAITING = 32  # queries that wait before accumulating scorers are fed: one block of attention weights
_TOGETHER = 1 << 16  # slots of rows (and of layers) that are copied to be seen together


def unserved_traits(policy: Policy) -> dict[str, str]:
    """Return what a paged cache cannot serve of a policy: name of the trait -> why; empty when it can be served."""
    found = {}
    traits = policy.traits
    if not traits.equal_counts:
        found["equal_counts"] = "heads or layers would keep different numbers of entries, and a block table is for all"
    if traits.re_rotates:
        found["re_rotates"] = "kept keys would be turned to other positions than the engine gives new ones"
    if traits.whole_prompt:
        found["whole_prompt"] = "an engine may read a prompt in pieces"
    if "modality" in traits.needs:
        found["modality"] = "an engine does not say which tokens are images"
    if NEED in traits.needs:
        found[NEED] = "an engine hands over keys, values and queries, not what its layers read"
    return found


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        packed: where its tokens go.
        incoming: what they are, by row; rows with no tokens are left out.
        freed: blocks that compactions before it have freed, by row.
    """

    packed: Packed
    incoming: Mapping[RowId, Incoming]
    freed: Mapping[RowId, tuple[int, ...]]


class PagedCache:
    """Drives one policy over the layers of one paged store.

    A step is `open` (compact what is due, plan the writes), then `append` and `record` per layer. What is due is
    compacted before the step's tokens, which is what an engine sees as *after the step before*. An engine that gives
    the freed blocks to others within the same step calls `compact` before it binds them.

    Args:
        policy: what to do.
        store: where entries live.
        num_layers: layers of the whole model.
        ropes: rotary embedding per layer, for policies that need it.
        rollback: tokens that may be taken back (the widest step of candidates).
        ranks: the other ranks of tensor parallelism; this process alone by default.
        heads: which KV heads of each layer are here; None for all of them.
        prompt_room, spared: see `Ledger`.

    Raises:
        UnsupportedError: the policy has a trait that a paged cache cannot serve; it is named.
    """

    def __init__(
        self,
        policy: Policy,
        store: PagedStore,
        num_layers: int,
        ropes: Mapping[int, Rope] | None = None,
        *,
        rollback: int = 0,
        ranks: Ranks = ALONE,
        heads: HeadSpan | None = None,
        prompt_room: int | None = None,
        spared: Callable[[int], bool] | None = None,
    ) -> None:
        for trait, why in unserved_traits(policy).items():
            raise UnsupportedError(f"policy {policy.name!r} cannot be served by a paged cache (trait {trait}): {why}.")
        self.policy, self.store, self.num_layers = policy, store, num_layers
        self.ropes = dict(ropes or {})
        self.layers = store.layout.layers
        self.ledger: Ledger[RowId] = Ledger(policy, prompt_room=prompt_room, spared=spared)
        layout = store.layout
        like = torch.empty(0, layout.heads, 0, layout.key_dim, dtype=layout.dtype, device=layout.device)
        ops.choose_backend(policy.backend, like)  # refuses now, rather than at the first compaction
        self.facts: dict[int, LayerFacts] = {}
        feeds = Observation(policy, self.ropes).active
        self.ring = QueryRing(policy.observed_queries, waiting=_WAITING if feeds else 0, rollback=rollback)
        self._observations: dict[RowId, Observation] = {}  # statistics of queries belong to a row
        self._compactor = Compactor(policy, self.ledger, self, ranks)
        self.heads = heads
        self._freed: dict[RowId, tuple[int, ...]] = {}
        self._step: Step | None = None
        self._pending: set[int] = set()

    # -- rows ---------------------------------------------------------------------------------------------------------

    def bind(self, row: RowId, blocks: Sequence[int], length: int = 0) -> None:
        """Begin a row in these blocks, the first `length` tokens of which another row has stored there (a prefix).

        Raises:
            UnsupportedError: `length` is not 0 and the policy accumulates something over all queries.
            CacheStateError: see `PagedStore.bind`.
        """
        if length and self.ring.feeds:
            needs = ", ".join(sorted(self.policy.needs & {"attention", "query_stream", "query_statistics"}))
            raise UnsupportedError(
                f"row {row!r}: policy {self.policy.name!r} must see every query (need {needs}), and those of a shared "
                "prefix are not computed; turn prefix caching off."
            )
        self.store.bind(row, blocks, length)
        self.ledger.enter([row])
        if length:
            self.ledger.advance({row: Incoming(length, "prompt")})
        if self.ring.active:
            self.ring.enter(row, length)
            self._observations[row] = Observation(self.policy, self.ropes)

    def extend(self, row: RowId, blocks: Sequence[int]) -> None:
        """Give a row more blocks."""
        self.store.extend(row, blocks)

    def shared(self, step: Mapping[RowId, Incoming]) -> dict[RowId, list[int]]:
        """Return the blocks that compactions before this step would write and that other rows read too.

        They must be replaced with `copy` before the step is opened.
        """
        found: dict[RowId, list[int]] = {}
        for row in self.ledger.due(step):
            kept = min(self.ledger.resident(row), self.ledger.entries(row))
            first = self.store.tables.tail(row, kept, whole=self.store.whole_blocks)
            blocks = self.store.tables.shared(row, first)
            if blocks:
                found[row] = blocks
        return found

    def copy(self, row: RowId, block: int, to: int) -> None:
        """Give a row a copy, in the free block `to`, of a block that others read too."""
        self.store.copy(row, block, to)

    def release(self, row: RowId) -> tuple[int, ...]:
        """Forget a row that has finished or been preempted; return the blocks that are free now."""
        self.ledger.drop(row)
        if self.ring.active:
            self.ring.drop(row)
            del self._observations[row]
        return self.store.release(row)

    def retract(self, row: RowId, tokens: int) -> None:
        """Take back the newest tokens of a row, back to its last compaction; raises CacheStateError beyond it."""
        self.ledger.retract(row, tokens)
        if self.ring.active:
            self.ring.retract(row, tokens)
        self.store.retract(row, tokens)

    # -- one step -----------------------------------------------------------------------------------------------------

    def open(self, step: Mapping[RowId, Incoming]) -> Step:
        """Begin a step: compact the rows that are due, and make place for the new tokens.

        Args:
            step: what comes, by row, in the order in which the tokens are packed.

        Raises:
            CacheStateError: the last step did not finish, or a row lacks blocks.
            UnsupportedError: a piece of a prompt is longer than the policy's `prefill_chunk`, or a step of candidates
                is wider than `rollback`.
            BudgetError, ScoreError: from the policy.
        """
        freed = self.compact(step)
        new = {row: incoming for row, incoming in step.items() if incoming.tokens}
        if self.ring.feeds:
            self.observe(waiting_of(self.ring, {row: incoming.tokens for row, incoming in new.items()}))
        packed = self.store.open({row: incoming.tokens for row, incoming in new.items()})
        self.ledger.advance(new)
        if self.ring.active:
            self.ring.open(packed)
        self._step = Step(packed, new, freed)
        self._pending = set(self.layers)
        return self._step

    def compact(self, step: Mapping[RowId, Incoming]) -> Mapping[RowId, tuple[int, ...]]:
        """Compact the rows that are due before these tokens; return the blocks that are free now, by row.

        Raises: see `open`.
        """
        if self._pending:
            raise CacheStateError(
                f"the last step stopped before layer {min(self._pending)}, so the cache is incomplete; use a new one."
            )
        new = {row: incoming for row, incoming in step.items() if incoming.tokens}
        for row, incoming in new.items():
            self._check(row, incoming)
        self._freed = {}
        due = self.ledger.due(new)
        if due and self.ring.feeds:
            self.observe(due)
        for row in due:
            self._check_window(row)
        self._compactor.run(due)
        return self._freed

    def _check(self, row: RowId, incoming: Incoming) -> None:
        chunk = self.policy.prefill_chunk if self.policy.phase != "decode" else None
        if incoming.kind == "prompt" and chunk is not None and incoming.tokens > chunk:
            raise UnsupportedError(
                f"row {row!r}: policy {self.policy.name!r} compresses the prompt in pieces of {chunk} tokens, but "
                f"{incoming.tokens} came at once; let the engine read prompts in pieces of at most {chunk}."
            )
        if incoming.kind == "verify" and self.ring.active and incoming.tokens > self.ring.rollback:
            raise UnsupportedError(
                f"row {row!r}: {incoming.tokens} candidates come at once, but at most {self.ring.rollback} can be "
                "taken back; make the cache with a larger `rollback`."
            )

    def _check_window(self, row: RowId) -> None:
        wanted = min(self.policy.observed_queries, self.ledger.position(row))
        if wanted and self.ring.left(row) < wanted:
            raise CacheStateError(
                f"row {row!r}: policy {self.policy.name!r} looks at the last {wanted} queries, but only "
                f"{self.ring.left(row)} have been computed behind a shared prefix; share less of it."
            )

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store one layer's new keys `[T, H, D]` and values `[T, H, Dv]`, unless the engine has done so itself."""
        assert self._step is not None
        self.store.append(layer, keys, values, self._step.packed)

    def record(self, layer: int, queries: Tensor, facts: LayerFacts) -> None:
        """Keep what the policy needs of one layer's queries `[T, Hq, D]`; the layer's keys have been stored."""
        assert self._step is not None
        self.facts[layer] = facts
        self._pending.discard(layer)
        if not self.ring.active:
            return
        packed = self._step.packed
        if self.ring.feeds:
            for row, start, count, before in zip(
                packed.rows, packed.starts, packed.counts(), packed.before, strict=False
            ):
                early = self.ring.early(count)
                if early:
                    real = torch.ones(1, early, dtype=torch.bool, device=queries.device)
                    some = queries[start : start + early].transpose(0, 1)[None]
                    self._feed(row, layer, some, packed.positions[None, start : start + early], real)
                    if not self._pending:
                        self.ring.fed(row, before + early)
        self.ring.put(layer, queries)

    # -- observation --------------------------------------------------------------------------------------------------

    def observe(self, rows: Sequence[RowId] | Mapping[RowId, int]) -> None:
        """Feed the waiting queries of some rows to the scorers that accumulate something."""
        for row in rows:
            count = self.ring.waiting(row)
            window = self.ring.window([row], [count]) if count else None
            if window is None:
                continue
            for layer in self.layers:
                self._feed(row, layer, self.ring.gather(layer, window), window.positions, window.valid)
            self.ring.fed(row, self.ledger.position(row))

    def _feed(self, row: RowId, layer: int, queries: Tensor, positions: Tensor, valid: Tensor) -> None:
        grouped = queries.unflatten(1, (self.store.layout.heads, self.facts[layer].groups))
        rows = self._rows([row])
        self._observations[row].feed(
            layer, grouped, grouped, positions, valid,
            lambda: self._view(layer, rows, None),
            lambda name, tensor: self.store.write(layer, rows, {f"state.{name}": tensor}),
        )  # fmt: skip

    # -- what a compactor sees ----------------------------------------------------------------------------------------

    def together(self, rows: Sequence[RowId]) -> Sequence[Sequence[Sequence[RowId]]]:
        """Return the rows in parts of equal length, so that nothing is padded: each row moves for itself."""
        by_length: dict[int, list[RowId]] = {}
        for row in rows:
            by_length.setdefault(self.ledger.resident(row), []).append(row)
        parts = []
        for length, some in by_length.items():
            step = max(1, _TOGETHER // (length * self.store.layout.heads))
            parts += [[some[i : i + step]] for i in range(0, len(some), step)]
        return parts

    def views(self, rows: Sequence[RowId], budget: Sequence[int]) -> Sequence[CacheView]:
        """Return what components may see of some rows, one view per layer.

        They are copies. Short rows get those of all layers at once, which may be scored as one; for long ones each is
        made when it is asked for, and not kept.
        """
        told, window = self._rows(rows, budget), self.ring.window(rows) if self.ring.observe else None
        layers, slots = self.layers, len(rows) * told.longest * self.store.layout.heads
        if slots * len(layers) > _TOGETHER:
            return LazyViews(lambda layer: self._view(layer, told, self._observed(layer, window)), layers)
        held = self.store.read_layers(layers, told)
        return [
            self._view(layer, told, self._observed(layer, window), each)
            for layer, each in zip(layers, held, strict=True)
        ]

    def keep(self, decided: Sequence[Decided[RowId]]) -> Mapping[RowId, int]:
        """Replace and move what was decided, and note the blocks that are free now."""
        held: dict[RowId, int] = {}
        for each in decided:
            rows = self._rows(each.rows)
            for i, layer in enumerate(self.layers):
                self.store.write(layer, rows, each.changes(i))
            kept = self.store.keep(
                rows, dict(zip(self.layers, each.kept, strict=True)), dict(zip(self.layers, each.counts, strict=True))
            )
            held |= zip(each.rows, kept.lengths, strict=True)
            self._freed |= kept.freed
        return held

    def _rows(self, rows: Sequence[RowId], budget: Sequence[int] | None = None) -> Rows:
        counts = [self.ledger.rows[row] for row in rows]
        numbers = {
            "prompt_length": [each.prompt for each in counts],
            "seen": [each.seen for each in counts],
            "compaction": [each.compactions for each in counts],
        }
        if budget is not None:
            numbers["budget"] = list(budget)
        return Rows.of(rows, [each.resident for each in counts], **numbers)

    def _observed(self, layer: int, window: Window | None) -> Observed | None:
        if window is None:
            return None
        queries = self.ring.gather(layer, window)
        grouped = queries.unflatten(1, (self.store.layout.heads, self.facts[layer].groups))
        return Observed(grouped, window, slice(None))

    def _view(self, layer: int, rows: Rows, observed: Observed | None, slots: SlotTensors | None = None) -> CacheView:
        """Return what components may see of one layer."""
        each = [self._observations[row].extras(layer, slice(0, 1)) for row in rows.ids] if self.ring.feeds else []
        extras = {name: torch.cat([one[name] for one in each]) for name in (each[0] if each else ())}
        return make_view(
            self.store.read(layer, rows) if slots is None else slots, rows, self.facts[layer],
            layer=layer, num_layers=self.num_layers, rope=self.ropes.get(layer), observed=observed, extras=extras,
            heads=self.heads,
        )  # fmt: skip
