"""Importance times what the value does to the output (CriticalKV's second stage, DefensiveKV)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView, lacking
from kvpolicy.policy.scoring import once
from kvpolicy.types import Scores
from kvpolicy_plugins.importance.worst_case import WorstCase


class _AsItsBase:
    """`comparable_across_heads` of a scorer that keeps what its base promises."""

    def __get__(self, scorer: OutputWeighted | None, owner: type[object]) -> bool:
        return scorer is not None and scorer.base.comparable_across_heads


class OutputWeighted(ImportanceScorer):
    """Score of `base` times ``|W_o v|_1``, the norm of the value after the output projection, mean over query heads.

    All heads of a layer write to the same output, so that products of different heads may be ranked together wherever
    the base scores may. Meant for scores that are not negative; others are counted from the lowest of their head.
    """

    shorthand: ClassVar[str | None] = "base"
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    paper: ClassVar[str] = "arXiv:2502.03805 (CriticalKV)"
    comparable_across_heads = _AsItsBase()

    base: ImportanceScorer = WorstCase()
    """The score that is weighted."""

    def laws_excused(self) -> Mapping[str, str]:
        return self.base.laws_excused()

    def score(self, view: CacheView) -> Scores:
        projection = view.extras.get("output_projection")
        if projection is None:
            raise lacking("importance: output_weighted", "the output projection", "`extras` with `output_projection`")
        norm = ops.projected_value_norm(view.values, projection, view.valid)
        return ops.from_lowest(once(self.base, view), view.valid) * norm
