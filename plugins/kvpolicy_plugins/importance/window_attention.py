"""Attention of the last queries (SnapKV, R-KV)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores
from kvpolicy_plugins._window import excused_by_smoothing, last_queries


class WindowAttention(ImportanceScorer):
    """Mean attention of the last queries to everything older than them, smoothed along the sequence.

    The defaults are R-KV as its code has it. SnapKV on KV heads is ``group: mean, group_stage: weights,
    softmax_over: row``; the equations of the R-KV paper are an even `smooth` with ``smooth_stage: query``.
    """

    same_for_layers: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    paper: ClassVar[str] = "arXiv:2404.14469 (SnapKV), arXiv:2505.24133 (R-KV)"
    comparable_across_heads: ClassVar[bool] = True

    observe: int = Field(default=8, ge=1)
    """Number of last queries to look at; fewer when the row is shorter."""
    group: Literal["max", "mean"] = "max"
    """How the query heads that share a KV head become one."""
    group_stage: Literal["logits", "weights"] = "logits"
    """Whether that happens before the softmax (`logits`) or after it (`weights`)."""
    softmax_over: Literal["candidates", "row"] = "candidates"
    """`candidates`: only entries older than the window share the probability; `row`: all that a query can see."""
    smooth: int = Field(default=7, ge=1)
    """Entries per smoothing window, 1 for none; odd is centred, an even 2W covers [i-W, i+W-1]."""
    smooth_kind: Literal["max", "mean", "mean_zero_padded"] = "max"
    """`mean_zero_padded` divides by the whole window at the edges too, as PyTorch's `avg_pool1d` does."""
    smooth_stage: Literal["mean", "query"] = "mean"
    """Smooth the mean over the queries (`mean`), or each query's row before the mean (`query`)."""

    def observed_queries(self) -> int:
        return self.observe

    def laws_excused(self) -> Mapping[str, str]:
        return excused_by_smoothing(self.smooth)

    def score(self, view: CacheView) -> Scores:
        window = last_queries(view, self.observe, "importance: window_attention")
        return ops.window_importance(
            *window,
            view.keys,
            view.positions,
            view.valid,
            scale=view.scale,
            softcap=view.softcap,
            attention_sinks=view.attention_sinks,
            group=self.group,
            group_stage=self.group_stage,
            softmax_over=self.softmax_over,
            smooth=self.smooth,
            smooth_kind=self.smooth_kind,
            smooth_stage=self.smooth_stage,
        )
