"""Weighted difference of shares of the maximum (G-KV)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores
from kvpolicy_plugins.mixers.linear import Linear


class MaxNormalised(Linear):
    """``weight * I / max|I| - (1 - weight) * R / max|R|``, with the largest magnitude of each head."""

    paper: ClassVar[str] = "arXiv:2512.00504"
    normalisation: ClassVar[Literal["none", "max", "min-max", "mean-matching", "z-score", "rank"]] = "max"
    keeps_comparability: ClassVar[bool] = False

    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the importance: 1 is importance alone, 0 redundancy alone."""

    def mix(self, importance: Scores, redundancy: Scores, view: CacheView) -> Scores:
        importance, redundancy = (ops.by_maximum(s, view.valid) for s in (importance, redundancy))
        return super().mix(importance, redundancy, view)
