"""Importance times the length of the value (VATP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.policy.scoring import once
from kvpolicy.types import Scores
from kvpolicy_plugins.importance.window_attention import WindowAttention


class ValueWeighted(ImportanceScorer):
    """Score of `base` times the norm of the value: attention to a short value moves the output little.

    Meant for scores that are not negative; others are counted from the lowest of their head.
    """

    shorthand: ClassVar[str | None] = "base"
    same_for_layers: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2406.12335 (VATP)"

    base: ImportanceScorer = WindowAttention()
    """The score that is weighted."""
    norm: Literal[1, 2] = Field(default=2)
    """1 for the sum of magnitudes, as in the paper, 2 for the Euclidean norm."""

    def laws_excused(self) -> Mapping[str, str]:
        return self.base.laws_excused()

    def score(self, view: CacheView) -> Scores:
        return ops.from_lowest(once(self.base, view), view.valid) * ops.lengths(view.values, self.norm)
