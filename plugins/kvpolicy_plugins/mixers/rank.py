"""Weighted difference of ranks."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvpolicy import ops
from kvpolicy.types import Scores
from kvpolicy.view import CacheView
from kvpolicy_plugins.mixers.linear import Linear


class Rank(Linear):
    """``weight * rank(I) - (1 - weight) * rank(R)``: ranks within each head, from 0 to 1, equal scores alike.

    Insensitive to how the numbers are distributed: outliers of an attention score weigh no more than their place.
    """

    paper: ClassVar[str] = ""
    normalisation: ClassVar[Literal["none", "max", "min-max", "mean-matching", "z-score", "rank"]] = "rank"
    keeps_comparability: ClassVar[bool] = False

    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the importance: 1 is importance alone, 0 redundancy alone."""

    def mix(self, importance: Scores, redundancy: Scores, view: CacheView) -> Scores:
        return super().mix(ops.ranks(importance, view.valid), ops.ranks(redundancy, view.valid), view)
