"""Neighbours among the keys, wherever they stand."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import RedundancyScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores
from kvpolicy_plugins._rope import NeedsRope, compared_keys


class KeyDensity(RedundancyScorer):
    """Kernel density of each key among those of its head: how many others point nearly the same way.

    ``mean_j exp((cos(k_i, k_j) - 1) / bandwidth)``: close neighbours count, others hardly do, where a mean cosine is
    mostly about keys that have little to do with each other. Without the rotary embedding a repetition is found
    wherever it stands. It takes O(N^2 D) operations and O(N) memory.
    """

    same_for_layers: ClassVar[bool] = True
    needs = NeedsRope()
    comparable_across_heads: ClassVar[bool] = True

    bandwidth: float = Field(default=0.2, gt=0, allow_inf_nan=False)
    """Distance from cosine 1 at which a neighbour counts for 1/e."""
    rope: Literal["pre", "post"] = "pre"
    """Compare the keys with the rotary embedding taken off (`pre`) or as cached (`post`)."""

    def score(self, view: CacheView) -> Scores:
        keys = compared_keys(view, self.rope, "redundancy: key_density")
        return ops.key_density(keys, view.valid, bandwidth=self.bandwidth)
