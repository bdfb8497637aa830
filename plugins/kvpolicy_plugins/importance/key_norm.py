"""Small keys matter (L2Norm, Knorm)."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores


class KeyNorm(ImportanceScorer):
    """Minus the Euclidean norm of the key, which a rotary embedding does not change."""

    same_for_layers: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2406.11430"

    def score(self, view: CacheView) -> Scores:
        norm = ops.lengths(view.keys)
        return torch.where(view.valid, -norm, 0.0)
