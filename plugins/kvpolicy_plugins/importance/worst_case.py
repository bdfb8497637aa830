"""The most that any of the last queries attends to an entry (DefensiveKV)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores
from kvpolicy_plugins._window import attention_pieces, excused_by_smoothing, last_queries

_TINY = 1e-30


class WorstCase(ImportanceScorer):
    """Largest weight that any of the last queries, of any query head, gives to an entry; the mean of a head at least.

    A mean over the window expects that what mattered goes on to matter alike; the maximum is the risk of the worst
    case, and the mean over the entries stands for what the window has not seen. Weights are softmaxed over all that a
    query sees; each query's are smoothed among the entries older than the window and keep their sum. Entries of the
    window itself get the largest score of their head: they are the newest, and policies protect them anyway.
    """

    same_for_layers: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    paper: ClassVar[str] = "arXiv:2510.13334 (DefensiveKV)"
    comparable_across_heads: ClassVar[bool] = True

    observe: int = Field(default=32, ge=1)
    """Number of last queries to look at; fewer when the row is shorter."""
    smooth: int = Field(default=5, ge=1)
    """Entries of the mean that smooths each query's weights, 1 for none; edges count as zeros."""
    prior: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """No score is below this many times the mean of the head's scores; 0 for no such floor."""

    def observed_queries(self) -> int:
        return self.observe

    def laws_excused(self) -> Mapping[str, str]:
        return excused_by_smoothing(self.smooth)

    def score(self, view: CacheView) -> Scores:
        window = last_queries(view, self.observe, "importance: worst_case")
        older = window.older(view)
        worst = torch.zeros(view.shape, dtype=torch.float32, device=view.device)
        if 0 in (window.queries.shape[3], view.shape[2]):
            return worst
        for part, weights, _ in attention_pieces(view, window):
            chosen = older[:, part, None, None]
            plain = weights.masked_fill(~chosen, 0.0)
            smoothed = ops.smooth_scores(plain, chosen, self.smooth, "mean_zero_padded")
            lost = plain.sum(-1, keepdim=True) / smoothed.sum(-1, keepdim=True).clamp(min=_TINY)
            worst[:, part] = (smoothed * lost).amax((2, 3))
        mean = worst.sum(-1, keepdim=True) / older.sum(-1, keepdim=True).clamp(min=1)
        worst = torch.maximum(worst, self.prior * mean)
        best = worst.masked_fill(~older, 0.0).amax(-1, keepdim=True)
        return torch.where(older, worst, best).masked_fill(~view.valid, 0.0)
