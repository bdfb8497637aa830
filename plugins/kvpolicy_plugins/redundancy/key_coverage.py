"""Neighbours among the keys, those first that matter more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.policy.scoring import once
from kvpolicy.types import Scores
from kvpolicy_plugins._rope import compared_keys
from kvpolicy_plugins.importance.window_attention import WindowAttention
from kvpolicy_plugins.redundancy.key_density import KeyDensity


class KeyCoverage(KeyDensity):
    """How well each key is covered by keys that lie close and matter more: of a group of alike keys the best one stays.

    ``mean_j w_ij exp((cos(k_i, k_j) - 1) / bandwidth)``, where `w_ij` is 1 for keys that `by` ranks above key `i` and
    `lower` for the others; of equal ranks the newer key counts as the higher one. `key_density` is ``lower: 1``, by
    which all of a group are redundant alike and may all go at once. O(N^2 D) operations, O(N) memory.
    """

    laws_not_applicable: ClassVar[Mapping[str, str]] = {
        "newest_twin_spared": "`by` says which of two equal entries matters more"
    }

    by: ImportanceScorer = WindowAttention()
    """Says which of two keys matters more."""
    lower: float = Field(default=0.3, ge=0, le=1)
    """Weight of the neighbours that matter less."""

    def score(self, view: CacheView) -> Scores:
        keys = compared_keys(view, self.rope, "redundancy: key_coverage")
        matters = once(self.by, view)
        density = ops.key_density(keys, view.valid, bandwidth=self.bandwidth, priority=matters, lower=self.lower)
        # An order hides that there is no number.
        return density.masked_fill(view.valid & ~matters.isfinite(), float("nan"))
