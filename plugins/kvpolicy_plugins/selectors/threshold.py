"""All that scores enough, and no more than the budget (DMS)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import Selector, Slots
from kvpolicy.types import Counts, KeepIndices, Mask, Scores


class Threshold(Selector):
    """Protected entries and those whose score is at least a threshold: as many as a head has, up to the count.

    The count is an upper limit (arXiv:2506.05345 decides each entry by itself): where more pass, the highest scores
    stay, and equal scores go to the older entry.
    """

    exact: ClassVar[bool] = False
    shorthand: ClassVar[str | None] = "value"
    paper: ClassVar[str] = "arXiv:2506.05345"
    laws_not_applicable: ClassVar[Mapping[str, str]] = {
        "constant_ignored": "the level of the scores is what it decides by",
        "enough_is_identity": "what does not pass goes although there is room",
    }

    value: float = Field(default=0.5, allow_inf_nan=False)
    """The threshold."""
    relative_to: Literal["none", "mean", "max"] = "mean"
    """The threshold is this many times the mean (or the highest) score of the head's unprotected entries; `none` takes
    it as it is. A score that misses it by no more than rounding passes. Relative thresholds are meant for scores that
    are not negative."""

    def select(self, scores: Scores, counts: Counts, protected: Mask, valid: Mask, slots: Slots) -> KeepIndices:
        candidates = valid & ~protected
        limit = torch.full_like(scores[..., :1], self.value, dtype=torch.float64)
        inside = torch.where(candidates, scores, 0.0).to(torch.float64)
        if self.relative_to == "mean":
            limit = limit * inside.sum(-1, keepdim=True) / candidates.sum(-1, keepdim=True).clamp(min=1)
        elif self.relative_to == "max":
            limit = limit * ops.extremes(scores, candidates)[1].to(torch.float64)
        passing = protected | (candidates & (inside >= limit - ops.ROUNDING * limit.abs()))
        return ops.top_k(scores, torch.minimum(counts, passing.sum(-1)), protected, valid, width=slots.width)
