"""Weighted difference of ranks."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores
from kvpolicy_plugins.mixers.linear import Linear


class Rank(Linear):
    """``weight * rank(I) - (1 - weight) * rank(R)``: ranks within each head, from 0 to 1, equal scores alike.

    Insensitive to how the numbers are distributed: outliers of an attention score weigh no more than their place. A
    rank makes a step of the smallest difference; a policy's scores are equal where they differ by rounding only.
    """

    paper: ClassVar[str] = ""
    normalisation: ClassVar[Literal["none", "max", "min-max", "mean-matching", "z-score", "rank"]] = "rank"
    keeps_comparability: ClassVar[bool] = False

    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the importance: 1 is importance alone, 0 redundancy alone."""

    def mix(self, importance: Scores, redundancy: Scores, view: CacheView) -> Scores:
        important, redundant = (ops.places(scores, view.valid) for scores in (importance, redundancy))
        # A place would hide that there is no number, and the entry would be kept or not by chance.
        unknown = view.valid & ~(importance.isfinite() & redundancy.isfinite())
        # Divided at the end: places are multiples of a half, so with equal weights equal sums are equal exactly.
        mixed = super().mix(important, redundant, view) / (view.valid.sum(-1, keepdim=True) - 1).clamp(min=1)
        return mixed.masked_fill(unknown, float("nan"))
