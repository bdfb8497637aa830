"""Importance in heads with different keys, diversity in heads with similar ones (MixKV)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer, Mixer
from kvpolicy.contracts.view import CacheView
from kvpolicy.policy.scoring import once
from kvpolicy.types import Scores
from kvpolicy_plugins._modality import NeedsModality, modalities
from kvpolicy_plugins.importance.value_norm import ValueNorm


class HeadAdaptive(Mixer):
    """``(1 - r) * (I + s) + r * d``, where `r` is the mean cosine between two keys of the head, at least 0.

    `s` is a second, intrinsic importance and `d` the negative redundancy; both are min-max normalised and stretched to
    the mean magnitude of `I`, per row and head. `r` is computed from the cached keys, in O(N D).
    """

    needs = NeedsModality()
    paper: ClassVar[str] = "arXiv:2510.20707"
    normalisation: ClassVar[Literal["none", "max", "min-max", "mean-matching", "z-score", "rank"]] = "mean-matching"
    keeps_comparability: ClassVar[bool] = False

    intrinsic: ImportanceScorer = ValueNorm()
    """The second importance; ``none`` leaves it out."""
    window: int = Field(default=0, ge=0)
    """The newest so many entries do not count in extremes and means (they do in `r`): the observation window."""
    by_modality: bool = False
    """Everything apart for text and for image tokens: `r`, extremes and means."""

    def mix(self, importance: Scores, redundancy: Scores, view: CacheView) -> Scores:
        intrinsic = once(self.intrinsic, view)
        older = ~view.newest(self.window)
        mixed = torch.zeros(view.shape, dtype=torch.float32, device=view.device)
        for part in modalities(view, self.by_modality):
            counted = part & older
            added = ops.mean_matched(intrinsic, counted, importance)
            diverse = ops.mean_matched(-redundancy, counted, importance)
            r = ops.head_redundancy(view.keys, part).clamp(min=0).unsqueeze(-1)
            mixed = torch.where(part, (1 - r) * (importance + added) + r * diverse, mixed)
        return mixed
