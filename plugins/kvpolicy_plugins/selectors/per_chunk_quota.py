"""Every chunk of the text keeps its share (Finch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import Selector, Slots
from kvpolicy.types import Counts, KeepIndices, Mask, Scores


class PerChunkQuota(Selector):
    """Protected entries, and of every chunk the highest scores, as many as its share of all other entries.

    Chunk `c` holds the original positions ``c * size ... c * size + size - 1``. A quota is in proportion to the
    entries that the chunk has left, rounded by largest remainder, so no part of a long text is wiped out. Equal scores
    go to the older entry. Cost: three sorts.
    """

    shorthand: ClassVar[str | None] = "size"
    paper: ClassVar[str] = "arXiv:2408.00167"
    laws_not_applicable: ClassVar[Mapping[str, str]] = {
        "highest_scores_stay": "entries compete inside their chunk",
        "ties_to_the_oldest": "entries compete inside their chunk",
        "more_keeps_a_superset": "rounded quotas of a larger count need not all be larger",
    }

    size: int = Field(default=1024, ge=1)
    """Tokens per chunk."""

    def select(self, scores: Scores, counts: Counts, protected: Mask, valid: Mask, slots: Slots) -> KeepIndices:
        chunk = ops.numbered(slots.positions.to(torch.int64) // self.size, valid)
        share = ops.region_sums((valid & ~protected).to(torch.float64), chunk, scores.shape[-1])
        kept = ops.quota_mask(scores, counts, protected, valid, chunk, share)
        return ops.top_k(kept.to(torch.float32), counts, protected, valid, width=slots.width)
