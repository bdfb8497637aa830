"""An importance scorer: one fp32 number per cached entry, higher = keep."""

from __future__ import annotations

import torch
from pydantic import Field

from kvpolicy import CacheView, ImportanceScorer
from kvpolicy.types import Scores


class ExamplePluginSize(ImportanceScorer):
    """Large values matter: what an entry can add to the output at most."""

    order: float = Field(default=1.0, ge=1)
    """Order of the norm: 1 sums magnitudes, 2 is the Euclidean length."""

    def score(self, view: CacheView) -> Scores:
        """Return `[B, H, N]`; slots that are not valid may hold anything, so they get a 0."""
        size = torch.linalg.vector_norm(view.values.float(), self.order, dim=-1)
        return torch.where(view.valid, size, 0.0)
