"""Regions share the budget by their scores, and none is wiped out (AMS)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import Selector, Slots
from kvpolicy.types import Counts, KeepIndices, Mask, Scores


class RegionQuota(Selector):
    """Protected entries, and of every region the highest scores, as many as its mass and its size earn it.

    The tokens after the prompt are cut into equal spans of positions, the prompt is a region of its own. A region's
    quota is in proportion to ``floor * (its share of the entries) + (1 - floor) * (its share of the mass)``, rounded by
    largest remainder; the mass is the sum of the scores above the lowest score of the head, so scores may be negative.
    Protected entries take no part. Equal scores go to the older entry. Cost: three sorts.
    """

    paper: ClassVar[str] = "arXiv:2605.23200"
    laws_not_applicable: ClassVar[Mapping[str, str]] = {
        "highest_scores_stay": "entries compete inside their region",
        "ties_to_the_oldest": "entries compete inside their region",
        "more_keeps_a_superset": "rounded quotas of a larger count need not all be larger",
    }

    regions: int = Field(default=4, ge=1, le=1024)
    """Equal spans of positions, from the end of the prompt to the newest token."""
    prompt: bool = True
    """Whether the prompt is one more region; otherwise the spans start at position 0."""
    floor: float = Field(default=0.5, ge=0, le=1)
    """Weight of the size against the mass: 1 gives every region the same share of its entries."""

    def select(self, scores: Scores, counts: Counts, protected: Mask, valid: Mask, slots: Slots) -> KeepIndices:
        candidates = valid & ~protected
        first = (slots.prompt_length if self.prompt else torch.zeros_like(slots.seen)).to(scores.device, torch.int64)
        span = (slots.seen.to(scores.device, torch.int64) - first).clamp(min=1)
        after = torch.where(valid, slots.positions, 0).to(torch.int64) - first[:, None, None]
        region = 1 + (after.clamp(min=0) * self.regions // span[:, None, None]).clamp(max=self.regions - 1)
        region = region.masked_fill(after < 0, 0)
        lowest, _ = ops.extremes(scores, candidates)
        above = torch.where(candidates, scores - lowest, 0.0).to(torch.float64)
        size = ops.region_sums(candidates.to(torch.float64), region, self.regions + 1)
        mass = ops.region_sums(above, region, self.regions + 1)
        size, mass = (x / x.sum(-1, keepdim=True).clamp(min=1e-300) for x in (size, mass))
        shares = self.floor * size + (1 - self.floor) * torch.where(mass.sum(-1, keepdim=True) > 0, mass, size)
        kept = ops.quota_mask(scores, counts, protected, valid, region, shares)
        return ops.top_k(kept.to(torch.float32), counts, protected, valid, width=slots.width)
