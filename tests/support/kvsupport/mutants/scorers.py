"""Broken importance and redundancy scorers and mixers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer, Mixer, RedundancyScorer
from kvpolicy.contracts.view import CacheView
from kvsupport.mutants._base import Mutant


def _norms(view: CacheView) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(view.keys.float(), dim=-1)
    return norm.masked_fill(~view.valid, 0.0)


class FirstRowOnly(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        return _norms(view)[:1].expand(view.shape).contiguous()


class FirstHeadOnly(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        return _norms(view)[:, :1].expand(view.shape).contiguous()


class LocalHeadNumbers(ImportanceScorer):
    laws_not_applicable: ClassVar[Mapping[str, str]] = {"permuting_heads": "each head draws its own numbers"}

    def score(self, view: CacheView) -> Tensor:
        head = torch.arange(view.shape[1], device=view.device)[:, None]
        compaction = view.compaction[:, None, None]
        return ops.counter_uniform(0, view.layer_idx, head, view.positions, compaction).masked_fill(~view.valid, 0.0)


class PadsScored(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        norm = view.keys.float().norm(dim=-1)
        total: Tensor = norm.sum(dim=-1, keepdim=True)
        return torch.div(norm, total)


class PadsCounted(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        norm = _norms(view)
        return norm - norm.mean(dim=-1, keepdim=True)


class BySlot(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        return torch.arange(view.shape[2], dtype=torch.float32).expand(view.shape).clone()


class BatchNormalised(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        norm = _norms(view)
        return norm / norm.amax().clamp(min=1e-6)


class HalfPrecision(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        keys = view.keys.masked_fill(~view.valid.unsqueeze(-1), 0)
        return (keys * keys).sum(dim=-1).sqrt().float()


class CacheDtype(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        return torch.where(view.valid, view.keys.norm(dim=-1), 0.0)


class DoublePrecision(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        return _norms(view).double()


class ZeroKeyDivides(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        norm = view.keys.float().norm(dim=-1)
        return torch.where(view.valid, view.keys.float()[..., 0] / norm, 0.0)


class WritesKeys(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        keys: Any = view.keys
        keys.sub_(1.0).masked_fill_(~view.valid.unsqueeze(-1), 0)
        return torch.as_tensor(keys.float().norm(dim=-1))


class AssumesContiguous(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        _, heads, slots, dim = view.keys.shape
        steps = (heads * slots * dim, slots * dim, dim, 1)
        keys = torch.as_strided(view.keys, view.keys.shape, steps, view.keys.storage_offset())
        return torch.where(view.valid, keys.norm(dim=-1), 0.0)


class UnwrittenMemory(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        scores = torch.empty(view.shape)
        scores[..., 1:] = _norms(view)[..., 1:]
        return scores


class SharedBuffer(ImportanceScorer):
    buffer: ClassVar[dict[tuple[int, ...], Tensor]] = {}

    def score(self, view: CacheView) -> Tensor:
        return self.buffer.setdefault(tuple(view.shape), _norms(view))


class SharedGenerator(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        return torch.rand(view.shape)


class SeededGenerator(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        return torch.rand(view.shape, generator=torch.Generator().manual_seed(0))


def _against(view: CacheView, asked: Tensor) -> Tensor:
    """Return the products of all keys with one vector `[B, H, D]` per head."""
    return torch.where(view.valid, (view.keys.float() @ asked.unsqueeze(-1)).squeeze(-1), 0.0)


class WrongGroups(ImportanceScorer):
    needs = frozenset({"queries"})

    def observed_queries(self) -> int:
        return 2

    def score(self, view: CacheView) -> Tensor:
        assert view.queries is not None
        assert view.query_valid is not None
        batch, heads, group, count, dim = view.queries.shape
        # Query head h*G + g is taken for g*H + h: the interleaved layout of other models.
        wrong = view.queries.float().reshape(batch, group, heads, count, dim).transpose(1, 2)
        return _against(view, torch.where(view.query_valid[:, None, None, :, None], wrong, 0.0).sum((2, 3)))


class LastColumnIsNewest(ImportanceScorer):
    needs = frozenset({"queries"})

    def observed_queries(self) -> int:
        return 3

    def score(self, view: CacheView) -> Tensor:
        assert view.queries is not None
        assert view.query_valid is not None
        return _against(
            view, torch.where(view.query_valid[:, None, -1:], view.queries[:, :, :, -1].float().sum(2), 0.0)
        )


class AllQueries(ImportanceScorer):
    needs = frozenset({"queries"})

    def observed_queries(self) -> int:
        return 2

    def score(self, view: CacheView) -> Tensor:
        assert view.queries is not None
        assert view.query_valid is not None
        asked = torch.where(view.query_valid[:, None, None, :, None], view.queries.float(), 0.0)
        return _against(view, asked.sum((2, 3)))


class StaleState(ImportanceScorer):
    """Adds to a state that belongs to another name, kept on the class: nothing moves it."""

    memory: ClassVar[list[float]] = [0.0]

    def score(self, view: CacheView) -> Tensor:
        self.memory[0] += 1.0
        return _norms(view) * self.memory[0]


class LayerCounts(ImportanceScorer):
    same_for_layers: ClassVar[bool] = True

    def score(self, view: CacheView) -> Tensor:
        return torch.where(view.valid, view.keys.float().norm(dim=-1) + view.layer_idx, 0.0)


class CoarseRounding(ImportanceScorer):
    """A ranking that hangs on the last bits of its input."""

    def score(self, view: CacheView) -> Tensor:
        return torch.where(view.valid, (view.keys.float().sum(-1) * 1e4).sin(), 0.0)


class CountsThreads(ImportanceScorer):
    def score(self, view: CacheView) -> Tensor:
        norm = _norms(view)
        share = view.shape[2] // torch.get_num_threads()
        return norm - norm[..., :share].mean(-1, keepdim=True) if view.shape[2] > 100 else norm


class OldestSpared(RedundancyScorer):
    def score(self, view: CacheView) -> Tensor:
        keys = torch.where(view.valid.unsqueeze(-1), view.keys, 0).float()
        same = (keys.unsqueeze(3) == keys.unsqueeze(2)).all(-1) & view.valid.unsqueeze(2)
        older = torch.ones(view.shape[2], view.shape[2], dtype=torch.bool).tril(-1)
        return torch.where(view.valid, (same & older).sum(-1).float(), 0.0)


class NoEpsilon(RedundancyScorer):
    def score(self, view: CacheView) -> Tensor:
        keys = torch.where(view.valid.unsqueeze(-1), view.keys, 0).float()
        unit = keys / keys.norm(dim=-1, keepdim=True)
        return torch.where(view.valid, (unit @ unit.sum(2).unsqueeze(-1)).squeeze(-1), 0.0)


class SwappedWeight(Mixer):
    weight: float = 0.1

    def mix(self, importance: Tensor, redundancy: Tensor, view: CacheView) -> Tensor:
        return (1 - self.weight) * importance - self.weight * redundancy


class WrongSign(Mixer):
    weight: float = 0.1

    def mix(self, importance: Tensor, redundancy: Tensor, view: CacheView) -> Tensor:
        return self.weight * importance + (1 - self.weight) * redundancy


class BatchMaximum(Mixer):
    def mix(self, importance: Tensor, redundancy: Tensor, view: CacheView) -> Tensor:
        largest = importance.masked_fill(~view.valid, 0.0).abs().amax().clamp(min=1e-6)
        return importance / largest - redundancy


class DividesByRange(Mixer):
    def mix(self, importance: Tensor, redundancy: Tensor, view: CacheView) -> Tensor:
        low = importance.masked_fill(~view.valid, float("inf")).amin(-1, keepdim=True)
        high = importance.masked_fill(~view.valid, float("-inf")).amax(-1, keepdim=True)
        return (importance - low) / (high - low)


class SaysUnused(Mixer):
    uses_redundancy: ClassVar[bool] = False

    def mix(self, importance: Tensor, redundancy: Tensor, view: CacheView) -> Tensor:
        return importance - redundancy


MUTANTS = (
    Mutant("scores the first row of the batch for all", "R-KV, MixKV, CAM, H2O, ChunkKV", FirstRowOnly),
    Mutant("scores the first head for all", "MixKV", FirstHeadOnly),
    Mutant("numbers the heads that are here", "a rank of tensor parallelism draws another's numbers", LocalHeadNumbers),
    Mutant("padding takes part in a normalisation", "pads scored as tokens", PadsScored),
    Mutant("padding is counted in a mean", "pads scored as tokens", PadsCounted),
    Mutant("takes the slot for the position", "cache order is not time order", BySlot),
    Mutant("normalises over the batch", "per-batch maximum", BatchNormalised),
    Mutant("squares in half precision", "fp16 overflow", HalfPrecision),
    Mutant("returns scores in the cache's dtype", "R-KV: bf16 scores tie", CacheDtype),
    Mutant("returns double precision", "wrong dtype", DoublePrecision),
    Mutant("divides by the norm of a zero key", "zero keys", ZeroKeyDivides),
    Mutant("writes to the keys", "AdaKV press: scores in place", WritesKeys, laws=("inputs_untouched",)),
    Mutant("assumes contiguous keys", "kernels and view()", AssumesContiguous),
    Mutant(
        "leaves one slot of torch.empty unwritten",
        "uninitialised memory",
        UnwrittenMemory,
        laws=("fresh_memory_unread",),
    ),
    Mutant(
        "one buffer for all layers", "one buffer for all layers", SharedBuffer, laws=("permuting_heads", "row_alone")
    ),
    Mutant("draws from the global generator", "RNG determinism", SharedGenerator, laws=("deterministic",)),
    Mutant("draws from a seeded generator", "a row in a batch differs from the row alone", SeededGenerator),
    Mutant("query heads in the wrong order", "GQA layout", WrongGroups),
    Mutant("takes the last query column for the newest", "a ring buffer of queries", LastColumnIsNewest),
    Mutant("looks at more queries than it asked for", "a log that components share", AllQueries),
    Mutant("remembers on the class", "stale state between generations", StaleState, laws=("deterministic",)),
    Mutant("ranks by the last bits", "bf16 against fp32", CoarseRounding),
    Mutant("the number of threads shows", "nondeterministic reductions", CountsThreads),
    Mutant("promises to ignore the layer and does not", "layers folded into rows", LayerCounts),
    Mutant("spares the oldest of equal keys", "R-KV: orientation of the similarity matrix", OldestSpared),
    Mutant("cosine without an epsilon", "zero keys", NoEpsilon),
    Mutant("weight swapped", "R-KV: lambda on the wrong side", SwappedWeight),
    Mutant("redundancy added instead of subtracted", "sign of the redundancy", WrongSign),
    Mutant("mixer normalises over the batch", "per-batch maximum", BatchMaximum),
    Mutant("min-max of equal scores", "all-equal scores", DividesByRange),
    Mutant("uses what it says it does not", "declared use", SaysUnused),
)
