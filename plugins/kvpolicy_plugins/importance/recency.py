"""Newer matters more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores


class Recency(ImportanceScorer):
    """The original position; with protected sinks this keeps sinks and the newest entries.

    fp32 holds positions up to 2^24 exactly; beyond, neighbours tie and the older one stays.
    """

    same_for_layers: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2309.17453"
    comparable_across_heads: ClassVar[bool] = True
    comparable_across_layers: ClassVar[bool] = True
    rounded: ClassVar[bool] = False
    laws_not_applicable: ClassVar[Mapping[str, str]] = {"permuting_entries": "the position is the score"}

    def score(self, view: CacheView) -> Scores:
        return view.positions.float().masked_fill(~view.valid, 0.0)
