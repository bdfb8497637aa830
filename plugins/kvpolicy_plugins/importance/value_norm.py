"""Large values matter."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores


class ValueNorm(ImportanceScorer):
    """Euclidean norm of the value: what an entry can add to the output at most."""

    same_for_layers: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2510.20707 (VNorm in MixKV)"

    def score(self, view: CacheView) -> Scores:
        norm = ops.lengths(view.values)
        return torch.where(view.valid, norm, 0.0)
