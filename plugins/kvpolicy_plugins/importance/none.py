"""No importance."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores


class NoImportance(ImportanceScorer):
    """Zero for every entry: redundancy, protections and age decide (ties keep the older entry)."""

    same_for_layers: ClassVar[bool] = True
    comparable_across_heads: ClassVar[bool] = True
    comparable_across_layers: ClassVar[bool] = True
    rounded: ClassVar[bool] = False
    constant: ClassVar[bool] = True

    def score(self, view: CacheView) -> Scores:
        return torch.zeros(view.shape, dtype=torch.float32, device=view.device)
