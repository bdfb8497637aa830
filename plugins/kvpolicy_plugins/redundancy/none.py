"""No redundancy."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvpolicy.components import RedundancyScorer
from kvpolicy.types import Scores
from kvpolicy.view import CacheView


class NoRedundancy(RedundancyScorer):
    """Zero for every entry."""

    same_for_layers: ClassVar[bool] = True
    comparable_across_heads: ClassVar[bool] = True
    comparable_across_layers: ClassVar[bool] = True

    def score(self, view: CacheView) -> Scores:
        return torch.zeros(view.shape, dtype=torch.float32, device=view.device)
