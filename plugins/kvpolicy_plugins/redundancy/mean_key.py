"""Similarity to the mean key (MixKV, KeyDiff)."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvpolicy import ops
from kvpolicy.contracts.components import RedundancyScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores
from kvpolicy_plugins._modality import NeedsModality, modalities


class MeanKey(RedundancyScorer):
    """Product of each key's direction with the mean direction of its head: its mean cosine to all keys.

    The negative of MixKV's diversity, in O(N D). Keys are compared as they are cached, after the rotary embedding.
    """

    needs = NeedsModality()
    paper: ClassVar[str] = "arXiv:2510.20707"
    comparable_across_heads: ClassVar[bool] = True

    unit_mean: bool = False
    """Give the mean length 1 as well, which makes the product a cosine (KeyDiff)."""
    by_modality: bool = False
    """Compare text with text and images with images."""

    def score(self, view: CacheView) -> Scores:
        scores = torch.zeros(view.shape, dtype=torch.float32, device=view.device)
        for part in modalities(view, self.by_modality):
            scores = scores + ops.mean_key_similarity(view.keys, part, unit_mean=self.unit_mean)
        return scores
