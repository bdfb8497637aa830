"""Whole chunks of neighbours (ChunkKV)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import Selector, Slots
from kvpolicy.types import Counts, KeepIndices, Mask, Scores


class Chunks(Selector):
    """Protected entries, and then whole chunks of neighbouring tokens by the mean score of what is left of them.

    Chunk `c` holds the original positions ``c * size ... c * size + size - 1``, so that a chunk stays one when entries
    have gone; protected entries take no part in the mean (arXiv:2502.00299). Of the last chunk
    that is taken as many entries stay as the count has room for, the highest scores first. Of equal chunks the older
    one stays. Cost: three sorts.
    """

    shorthand: ClassVar[str | None] = "size"
    paper: ClassVar[str] = "arXiv:2502.00299"
    laws_not_applicable: ClassVar[Mapping[str, str]] = {
        "highest_scores_stay": "an entry stays or goes with its chunk",
        "ties_to_the_oldest": "an entry stays or goes with its chunk",
    }

    size: int = Field(default=20, ge=1)
    """Tokens per chunk, 10 to 20 in the paper."""

    def select(self, scores: Scores, counts: Counts, protected: Mask, valid: Mask, slots: Slots) -> KeepIndices:
        candidates = valid & ~protected
        count = scores.shape[-1]
        chunk = ops.numbered(slots.positions.to(torch.int64) // self.size, valid)
        number = ops.region_sums(candidates.to(torch.float64), chunk, count)
        total = ops.region_sums(torch.where(candidates, scores, 0.0).to(torch.float64), chunk, count)
        mean = ops.levelled((total / number.clamp(min=1)).float(), number > 0).gather(-1, chunk)
        order = ops.ordered_by(candidates, mean, -chunk, torch.where(candidates, scores, 0.0))
        return ops.top_k(-ops.ranks_in(order).to(torch.float32), counts, protected, valid, width=slots.width)
