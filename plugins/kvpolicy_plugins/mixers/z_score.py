"""Weighted difference of standard scores (Compactor)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores
from kvpolicy_plugins.mixers.linear import Linear


class ZScore(Linear):
    """``weight * z(I) - (1 - weight) * z(R)``, with the mean and the standard deviation of each head."""

    paper: ClassVar[str] = "arXiv:2507.08143"
    normalisation: ClassVar[Literal["none", "max", "min-max", "mean-matching", "z-score", "rank"]] = "z-score"
    keeps_comparability: ClassVar[bool] = False

    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the importance: 1 is importance alone, 0 redundancy alone."""

    def mix(self, importance: Scores, redundancy: Scores, view: CacheView) -> Scores:
        return super().mix(ops.z_scores(importance, view.valid), ops.z_scores(redundancy, view.valid), view)
