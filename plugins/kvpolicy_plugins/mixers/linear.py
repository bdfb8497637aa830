"""Weighted difference (R-KV)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from kvpolicy.contracts.components import Mixer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores


class Linear(Mixer):
    """``weight * importance - (1 - weight) * redundancy`` (eq. 7), without any normalisation."""

    same_for_layers: ClassVar[bool] = True
    shorthand: ClassVar[str | None] = "weight"
    paper: ClassVar[str] = "arXiv:2505.24133"

    weight: float = Field(default=0.1, ge=0, le=1)
    """Share of the importance: 1 is importance alone, 0 redundancy alone."""

    def mix(self, importance: Scores, redundancy: Scores, view: CacheView) -> Scores:
        return self.weight * importance - (1.0 - self.weight) * redundancy
