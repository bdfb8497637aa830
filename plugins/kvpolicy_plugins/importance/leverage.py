"""Keys that the others do not span (Compactor)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores
from kvpolicy_plugins._rope import unrotated_keys


class Leverage(ImportanceScorer):
    """Approximate statistical leverage of each un-rotated key among those of its head.

    ``x_i (X'X)^-1 x_i'`` where the rows of `X` are the centred keys times a Gaussian matrix of `sketch` columns
    (section 3.1), within [0, 1]. The matrix is the same for all heads and compactions: it depends on `seed` alone. It
    takes many more entries than columns to tell them apart: fewer have a leverage of nearly 1 each. O(N D sketch), no
    queries.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rope"})
    paper: ClassVar[str] = "arXiv:2507.08143"
    comparable_across_heads: ClassVar[bool] = True
    laws_not_applicable: ClassVar[Mapping[str, str]] = {"permuting_entries": "a key is un-rotated by its position"}

    sketch: int = Field(default=48, ge=0)
    """Columns of the sketch; 0 for the exact leverage."""
    sinks: int = Field(default=8, ge=0)
    """First positions of the row that take no part; they get the largest score of their head."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the sketch."""

    def score(self, view: CacheView) -> Scores:
        candidates = view.valid & (view.positions >= self.sinks)
        dim = view.keys.shape[-1]
        projection = ops.gaussian_sketch(dim, self.sketch, self.seed, view.device) if self.sketch else None
        scores = ops.leverage(unrotated_keys(view, "importance: leverage"), candidates, projection)
        return torch.where(view.valid & ~candidates, scores.amax(dim=-1, keepdim=True), scores)
