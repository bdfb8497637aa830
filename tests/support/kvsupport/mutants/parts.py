"""Broken selectors, allocators, protections, triggers and post-operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import (
    AllocationRequest,
    BudgetAllocator,
    Counters,
    PostOperation,
    Protection,
    Selector,
    Slots,
    Trigger,
)
from kvpolicy.contracts.view import CacheView
from kvpolicy.testing.cases import keep_indices
from kvpolicy.types import KeepIndices
from kvsupport.mutants._base import Mutant


def _marked(kept: KeepIndices, valid: Tensor) -> Tensor:
    columns = torch.arange(kept.indices.shape[-1]) < kept.lengths.unsqueeze(-1)
    marked = torch.zeros(*valid.shape[:2], valid.shape[2] + 1, dtype=torch.bool)
    return marked.scatter(-1, kept.indices.masked_fill(~columns, valid.shape[2]), True)[..., :-1]


class Unsorted(Selector):
    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor, slots: Slots) -> KeepIndices:
        kept = ops.top_k(scores, counts, protected, valid)
        index = kept.indices.clone()
        for b, h in torch.cartesian_prod(torch.arange(counts.shape[0]), torch.arange(counts.shape[1])).tolist():
            n = int(counts[b, h])
            index[b, h, :n] = index[b, h, :n].flip(0)
        return KeepIndices(index, kept.lengths)


class TiesToNewest(Selector):
    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor, slots: Slots) -> KeepIndices:
        turned = ops.top_k(scores.flip(-1), counts, protected.flip(-1), valid.flip(-1))
        return keep_indices(_marked(turned, valid).flip(-1))


class ForgetsProtection(Selector):
    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor, slots: Slots) -> KeepIndices:
        return ops.top_k(scores, counts, torch.zeros_like(protected), valid)


class KeepsPads(Selector):
    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor, slots: Slots) -> KeepIndices:
        return ops.top_k(torch.nan_to_num(scores), counts, protected, torch.ones_like(valid))


class OneTooFew(Selector):
    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor, slots: Slots) -> KeepIndices:
        return ops.top_k(scores, torch.maximum(counts - 1, protected.sum(-1)), protected, valid)


class OneTooMany(Selector):
    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor, slots: Slots) -> KeepIndices:
        return ops.top_k(scores, torch.minimum(counts + 1, valid.sum(-1)), protected, valid)


class BeyondTheLimit(Selector):
    """A threshold that counts as more than an upper limit allows."""

    exact: ClassVar[bool] = False

    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor, slots: Slots) -> KeepIndices:
        passing = valid & ((scores > 0) | protected)
        return ops.top_k(scores, passing.sum(-1), protected, valid)


class Sentinel(Selector):
    """Protection by a large score."""

    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor, slots: Slots) -> KeepIndices:
        return ops.top_k(scores.masked_fill(protected, 1000.0), counts, torch.zeros_like(protected), valid)


class LowestScores(Selector):
    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor, slots: Slots) -> KeepIndices:
        return ops.top_k(-scores, counts, protected, valid)


class SwapsAtTheCut(Selector):
    """With an even count the last chosen entry is exchanged for the next one."""

    def select(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor, slots: Slots) -> KeepIndices:
        even = (counts % 2 == 0).unsqueeze(-1)
        return ops.top_k(torch.where(even, -scores, scores), counts, protected, valid)


class FloorRounding(BudgetAllocator):
    def allocate(self, request: AllocationRequest) -> list[Tensor]:
        counts = []
        for valid, protected in zip(request.valid, request.protected, strict=True):
            total = torch.minimum(request.budget * valid.shape[1], valid.sum(-1)).unsqueeze(-1)
            share = total * valid // valid.sum(-1, keepdim=True).clamp(min=1)
            counts.append(torch.maximum(torch.minimum(share, valid), protected))
        return counts


class RoundsEachUp(BudgetAllocator):
    counts: ClassVar[Literal["equal", "per_layer", "per_head"]] = "per_layer"

    def allocate(self, request: AllocationRequest) -> list[Tensor]:
        layers = len(request.valid)
        weights = [2 * (layers - i) / (layers + 1) for i in range(layers)]
        return [
            torch.minimum((request.budget * w).ceil().to(torch.int64)[:, None].expand_as(v), v)
            for w, v in zip(weights, request.valid, strict=True)
        ]


class MoreThanThereIs(BudgetAllocator):
    counts: ClassVar[Literal["equal", "per_layer", "per_head"]] = "equal"

    def allocate(self, request: AllocationRequest) -> list[Tensor]:
        return [request.budget[:, None].expand(v.shape).clone() for v in request.valid]


class SmallestRowForAll(BudgetAllocator):
    counts: ClassVar[Literal["equal", "per_layer", "per_head"]] = "equal"

    def allocate(self, request: AllocationRequest) -> list[Tensor]:
        return [torch.minimum(request.budget.amin(), v) for v in request.valid]


class FirstHeadGetsMore(BudgetAllocator):
    counts: ClassVar[Literal["equal", "per_layer", "per_head"]] = "equal"

    def allocate(self, request: AllocationRequest) -> list[Tensor]:
        counts = [torch.minimum(request.budget[:, None], v) for v in request.valid]
        for count, valid, protected in zip(counts, request.valid, request.protected, strict=True):
            last = count.shape[1] - 1
            moves = (last > 0) & (count[:, 0] < valid[:, 0]) & (count[:, last] > protected[:, last])
            count[:, 0] += moves.long()
            count[:, last] -= moves.long()
        return counts


class OneTooFewRecent(Protection):
    count: int = 3

    def mask(self, view: CacheView) -> Tensor:
        return view.newest(self.count - 1)

    def reserved(self, prompt_length: int = 0) -> int:
        return self.count


class FirstSlots(Protection):
    count: int = 2

    def mask(self, view: CacheView) -> Tensor:
        return (torch.arange(view.shape[2]) < self.count).expand(view.shape)

    def reserved(self, prompt_length: int = 0) -> int:
        return self.count


class OldestOnes(Protection):
    """Sinks taken by rank: after an eviction others move up."""

    def mask(self, view: CacheView) -> Tensor:
        half = view.valid.sum(-1, keepdim=True) // 2
        return view.valid & (view.valid.cumsum(-1) <= half)

    def reserved(self, prompt_length: int = 0) -> int:
        return 99


class LongestKey(Protection):
    """Each head keeps a slot of its own, and all are said to keep the same."""

    same_for_heads: ClassVar[bool] = True

    def mask(self, view: CacheView) -> Tensor:
        lengths = view.keys.float().norm(dim=-1).masked_fill(~view.valid, -1.0)
        longest: Tensor = torch.arange(view.shape[2]) == lengths.argmax(-1, keepdim=True)
        return view.valid & longest

    def reserved(self, prompt_length: int = 0) -> int:
        return 1


class CountsSteps(Trigger):
    asked: ClassVar[list[int]] = [0]

    def fires(self, counters: Counters) -> bool:
        self.asked[0] += 1
        return counters.resident > counters.budget and self.asked[0] % 3 == 0

    def buffer(self) -> int:
        return 3


class OneStepLate(Trigger):
    def fires(self, counters: Counters) -> bool:
        return counters.resident > counters.budget + 1

    def buffer(self) -> int:
        return 1


class FiresAtBudget(Trigger):
    def fires(self, counters: Counters) -> bool:
        return counters.resident >= counters.budget

    def buffer(self) -> int:
        return 1


class PositionsBySlot(PostOperation):
    changes: ClassVar[Literal["positions", "values", "keys"]] = "positions"

    def apply(self, view: CacheView, kept: KeepIndices) -> Mapping[str, Tensor]:
        slots = torch.arange(view.shape[2], dtype=torch.int32).expand(view.shape).clone()
        return {"keys": view.keys, "rope_positions": slots}


class WritesInPlace(PostOperation):
    def apply(self, view: CacheView, kept: KeepIndices) -> Mapping[str, Tensor]:
        values: Any = view.values
        values.mul_(0.5)
        return {"values": values}


class MergesPads(PostOperation):
    def apply(self, view: CacheView, kept: KeepIndices) -> Mapping[str, Tensor]:
        return {"values": view.values + 0.1 * view.values.mean(2, keepdim=True)}


MUTANTS = (
    Mutant("indices not sorted", "R-KV: entries in score order", Unsorted),
    Mutant("ties to the newest", "ties", TiesToNewest),
    Mutant("protected entries evicted", "protection forgotten", ForgetsProtection),
    Mutant("padding kept", "mask not gathered, pads kept", KeepsPads),
    Mutant("one entry too few", "n == B and n < B + 1", OneTooFew),
    Mutant("one entry too many", "count off by one", OneTooMany),
    Mutant("a threshold keeps more than the limit", "top-p without a cap", BeyondTheLimit),
    Mutant("protection by a large score", "max + 1, 1e5: sentinels", Sentinel),
    Mutant("lowest scores kept", "direction of the score", LowestScores),
    Mutant("another choice at another budget", "no superset", SwapsAtTheCut),
    Mutant("shares rounded down", "budget sum not exact", FloorRounding),
    Mutant("shares rounded up", "PyramidKV: 42 of 40", RoundsEachUp),
    Mutant("counts beyond what is there", "windows shorter than w", MoreThanThereIs),
    Mutant("the smallest row's budget for all", "rows coupled", SmallestRowForAll),
    Mutant("equal shares that are not equal", "declared shares", FirstHeadGetsMore),
    Mutant("recent window one too short", "off-by-one in the window", OneTooFewRecent),
    Mutant("sinks by slot", "left padding", FirstSlots),
    Mutant("sinks by rank", "protection moves up after an eviction", OldestOnes),
    Mutant("a slot of each head's own", "said to be the same for all heads", LongestKey),
    Mutant("trigger counts calls", "R-KV: length on the module", CountsSteps, laws=("trigger_is_pure",)),
    Mutant("trigger one step late", "buffer exceeded", OneStepLate),
    Mutant("trigger fires at the budget", "R-KV permutes at n == B", FiresAtBudget),
    Mutant("re-rotation by slot", "positions rolled wrongly", PositionsBySlot),
    Mutant("post-operation in place", "inputs written", WritesInPlace, laws=("inputs_untouched",)),
    Mutant("merge takes padding in", "CAM: pads merged", MergesPads),
)
