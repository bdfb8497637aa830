"""No redundancy."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvpolicy.contracts.components import RedundancyScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores


class NoRedundancy(RedundancyScorer):
    """Zero for every entry."""

    same_for_layers: ClassVar[bool] = True
    comparable_across_heads: ClassVar[bool] = True
    comparable_across_layers: ClassVar[bool] = True
    rounded: ClassVar[bool] = False
    constant: ClassVar[bool] = True

    def score(self, view: CacheView) -> Scores:
        return torch.zeros(view.shape, dtype=torch.float32, device=view.device)
