"""Attention that is remembered from one compaction to the next (G-KV)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer, SlotState
from kvpolicy.contracts.view import CacheView
from kvpolicy.policy.scoring import once
from kvpolicy.types import Scores
from kvpolicy_plugins._window import excused_by_smoothing
from kvpolicy_plugins.importance.window_attention import WindowAttention

_STATE = "attention_memory"
_NEVER = -1.0


class AttentionMemory(ImportanceScorer):
    """``F = max(decay * F_old, F_new)``, where `F_new` is a score of the moment divided by its head's largest.

    `F` is stored at each compaction with the entries that stay, all but the newest `window`; an entry without a past
    takes `F_new` as it is. The score of the moment must not be negative. Within a head the numbers are shares of the
    best entry, which says nothing about other heads.
    """

    paper: ClassVar[str] = "arXiv:2512.00504"

    base: ImportanceScorer = WindowAttention(
        observe=16, group="max", group_stage="weights", softmax_over="row", smooth=1
    )
    """The score of the moment; by default attention of the last 16 queries, the largest of the group's weights."""
    decay: float = Field(default=0.8, ge=0, le=1)
    """What is left of the past at each compaction."""
    combine: Literal["max", "mean", "sum"] = "max"
    """`mean` is `decay * F_old + (1 - decay) * F_new`, `sum` is `decay * F_old + F_new`."""
    window: int = Field(default=16, ge=0)
    """The newest so many entries are not remembered: the queries of the window are their own."""
    smooth: int = Field(default=1, ge=1)
    """Maximum over so many older entries, after the memory; 1 for none."""

    def slot_state(self) -> tuple[SlotState, ...]:
        return (SlotState(_STATE, fill=_NEVER),)

    def laws_excused(self) -> Mapping[str, str]:
        return excused_by_smoothing(self.smooth)

    def remember(self, view: CacheView) -> Mapping[str, Tensor]:
        return {_STATE: torch.where(self._older(view), self._combined(view), view.held(_STATE))}

    def score(self, view: CacheView) -> Scores:
        combined = self._combined(view)
        if self.smooth == 1:
            return combined
        older = self._older(view)
        smoothed = ops.smooth_scores(combined, older, self.smooth, "max")
        return torch.where(view.valid & ~older, combined, smoothed)

    def _older(self, view: CacheView) -> Tensor:
        return view.valid & ~view.newest(self.window)

    def _combined(self, view: CacheView) -> Scores:
        now = ops.by_maximum(once(self.base, view), view.valid)
        before = torch.where(view.valid, view.held(_STATE), _NEVER)
        if self.combine == "max":
            both = torch.maximum(self.decay * before, now)
        else:
            both = self.decay * before + (now if self.combine == "sum" else (1 - self.decay) * now)
        return torch.where(before < 0, now, both)
