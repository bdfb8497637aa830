"""A second importance score in the place of the redundancy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from kvpolicy.contracts.components import ImportanceScorer, RedundancyScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.policy.scoring import once
from kvpolicy.types import Scores
from kvpolicy_plugins.importance.leverage import Leverage


class Negative(RedundancyScorer):
    """Minus the score of `base`, so that a mixer adds two importance scores.

    With Compactor's leverage it is redundancy proper: a key that the others span can be replaced by them.
    """

    shorthand: ClassVar[str | None] = "base"
    same_for_layers: ClassVar[bool] = True
    laws_not_applicable: ClassVar[Mapping[str, str]] = {
        "newest_twin_spared": "the base says which of two equal entries matters more"
    }

    base: ImportanceScorer = Leverage()
    """The importance scorer; Compactor's leverage by default."""

    def score(self, view: CacheView) -> Scores:
        return -once(self.base, view)
