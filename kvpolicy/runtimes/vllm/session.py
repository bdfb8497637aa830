"""A worker's side: requests that vLLM's scheduler sends, in a paged cache over vLLM's own pages. No vLLM here.

One step is `begin` (what the scheduler ordered: rows that go, compactions, new blocks), `plan` (once the runner has put
its batch in order: what attention must know), `record` per layer, and `end`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvpolicy.cache.ledger import Incoming
from kvpolicy.cache.paged import PagedCache
from kvpolicy.cache.picture import LayerFacts
from kvpolicy.cache.store.packed import Packed
from kvpolicy.errors import CacheStateError
from kvpolicy.runtimes.vllm.books import incoming


@dataclass(frozen=True)
class Reading:
    """What attention must know of a batch in which some requests have been compacted.

    Attributes:
        skipped: blocks that each request's entries begin behind, one integer per request.
        lengths: entries that each reads, those of this step included.
        packed: where the step's tokens are stored.
        moved: some tokens are not stored in the slot of their position.
    """

    skipped: Sequence[int]
    lengths: Sequence[int]
    packed: Packed
    moved: bool


@dataclass
class Counts:
    """What a worker has done so far: `evicted` entries per head and layer, `compactions` of requests, `seconds`."""

    evicted: int = 0
    compactions: int = 0
    seconds: float = 0.0


@dataclass
class Session:
    """The requests of one worker.

    Args:
        cache: over the pages of vLLM.
        facts: what attention calls tell, by layer.
        order: returns the requests of the batch that the runner has prepared, in its order.
        check: look at everything, at every step; see `kvpolicy.runtimes.vllm.check`.
    """

    cache: PagedCache
    facts: Mapping[int, LayerFacts]
    order: Callable[[], Sequence[str]]
    check: Callable[[Session, Reading, Tensor], None] | None = None
    counts: Counts = field(default_factory=Counts)
    _prompts: dict[str, int] = field(default_factory=dict)
    _step: dict[str, Incoming] = field(default_factory=dict)
    _reading: Reading | None = None

    def begin(self, ordered: Any) -> None:
        """Carry out what vLLM's scheduler orders for a step, before its tokens are computed.

        Args:
            ordered: a SchedulerOutput.

        Raises:
            CacheStateError: scheduler and worker have counted differently.
            BudgetError, ComponentError: from the policy.
        """
        cached = ordered.scheduled_cached_reqs
        gone = set(ordered.finished_req_ids) | set(getattr(ordered, "preempted_req_ids", None) or ())
        for row in gone | set(cached.resumed_req_ids):
            if row in self.cache.store.tables:
                self.cache.release(row)
        for row in gone - set(cached.req_ids):
            self._prompts.pop(row, None)
        bound: dict[str, Sequence[int]] = {}
        before: dict[str, int] = {}
        for new in ordered.scheduled_new_reqs:
            self._prompts[new.req_id] = new.prompt_len
            bound[new.req_id], before[new.req_id] = new.block_ids[0], new.num_computed_tokens
        for row, blocks, seen in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            bound[row], before[row] = () if blocks is None else blocks[0], seen
        for row, seen in before.items():
            counted = self.cache.ledger.position(row) if row in self.cache.store.tables else 0
            if counted != seen:
                raise CacheStateError(
                    f"request {row!r}: vLLM has computed {seen} tokens, but {counted} were counted here; tokens that "
                    "are taken back, adopted or loaded from elsewhere cannot be served."
                )
        self._step = {
            row: incoming(before[row], tokens, self._prompts[row])
            for row, tokens in ordered.num_scheduled_tokens.items()
        }
        self._compact()
        for row, blocks in bound.items():
            if row in self.cache.store.tables:
                self.cache.extend(row, blocks)
            else:
                self.cache.bind(row, blocks)

    def _compact(self) -> None:
        """Compact what is due, before anything of it is given to others."""
        due = self.cache.ledger.due(self._step)
        if not due:
            return
        held = sum(map(self.cache.ledger.resident, due))
        start = time.perf_counter()
        self.cache.compact(self._step)
        self.counts.seconds += time.perf_counter() - start
        self.counts.compactions += len(due)
        self.counts.evicted += held - sum(map(self.cache.ledger.resident, due))

    def plan(self, table: Tensor) -> Reading | None:
        """Make place for the step's tokens, and return what attention must know; None for a batch of no requests.

        Args:
            table: vLLM's block table, `[rows, blocks]`, in the order of the batch.
        """
        if not self._step:
            return None
        if self._reading is None:
            order = [row for row in self.order() if row in self._step]
            if len(order) != len(self._step):
                raise CacheStateError(
                    f"vLLM computes {len(order)} requests of the {len(self._step)} that were scheduled; this version "
                    "prepares its batches in a way that kvpolicy does not know."
                )
            packed = self.cache.open({row: self._step[row] for row in order}).packed
            tables = [self.cache.store.tables[row] for row in order]
            skipped = [each.first // each.block for each in tables]
            moved = any(each.shift for each in tables)
            self._reading = Reading(skipped, [each.length for each in tables], packed, moved)
            if self.check is not None:
                self.check(self, self._reading, table)
        return self._reading

    def end(self) -> None:
        """End a step: what vLLM computes until the next one (batches that are made up) is none of ours."""
        self._step, self._reading = {}, None

    def record(self, layer: int, queries: Tensor) -> None:
        """Keep what the policy needs of one layer's queries `[T, Hq, D]`; its keys and values have been stored."""
        if self._reading is not None:
            self.cache.record(layer, queries[: self._reading.packed.tokens], self.facts[layer])


def shifted(table: Tensor, skipped: Sequence[int]) -> Tensor:
    """Return a block table whose rows begin so many blocks further on, `[rows, blocks]`; further rows stay."""
    by = torch.zeros(table.shape[0], dtype=torch.int64)
    by[: len(skipped)] = torch.tensor(skipped)
    columns = torch.arange(table.shape[1], device=table.device)[None] + by.to(table.device)[:, None]
    return table.gather(1, columns.clamp_(max=table.shape[1] - 1))


def with_lengths(lengths: Tensor, held: Sequence[int]) -> Tensor:
    """Return sequence lengths with what the first requests hold in the place of what they have seen."""
    told = lengths.clone()
    told[: len(held)] = torch.tensor(held, dtype=lengths.dtype).to(lengths.device)
    return told
