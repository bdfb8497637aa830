"""Important blocks, and blocks that stand for the others (KVCrush)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import Selector, Slots
from kvpolicy.types import Counts, KeepIndices, Mask, Scores


class Representatives(Selector):
    """Protected entries, blocks with the highest mean scores, and for the rest of the count blocks of every sort.

    Block `c` holds the original positions ``c * size ... c * size + size - 1``. An entry's bit says whether it is in
    the upper half of what is unprotected; a block is told by its bits, and sorts of blocks by how many bits differ from
    an anchor. Blocks that are not important are put in order of that distance, and every so-many-th of them stays
    (arXiv:2503.00022, in the form that OpenVINO runs). Exactly the count stays: of the last block of either part only
    its highest scores; where blocks have lost entries, the following blocks fill up. Of equal blocks the older comes
    first. Heads that share a set have the same bits. Cost: six sorts.
    """

    paper: ClassVar[str] = "arXiv:2503.00022 (KVCrush)"
    laws_not_applicable: ClassVar[Mapping[str, str]] = {
        "highest_scores_stay": "a part stays for others that are like it",
        "ties_to_the_oldest": "an entry stays or goes with its block",
        "more_keeps_a_superset": "which blocks stand for the others changes with their number",
    }

    size: int = Field(default=16, ge=1)
    """Tokens per block."""
    share: float = Field(default=0.25, ge=0, le=1)
    """Share of the unprotected count that goes to blocks which stand for others, rounded down."""
    anchor: Literal["alternate", "mean", "zeros", "ones"] = "alternate"
    """What blocks are compared with: 0101..., the bits that most blocks have, or all bits 0 or 1."""

    def select(self, scores: Scores, counts: Counts, protected: Mask, valid: Mask, slots: Slots) -> KeepIndices:
        candidates = valid & ~protected
        clean = torch.where(candidates, scores, 0.0)
        position = torch.where(valid, slots.positions, 0).to(torch.int64)
        block = ops.numbered(position // self.size, valid)
        free = counts - protected.sum(-1)
        standing = (free * self.share).floor().to(torch.int64)
        mean = _means(clean, candidates, block)
        order = ops.ordered_by(candidates, mean, -block, clean)
        important = candidates & (ops.ranks_in(order) < (free - standing).unsqueeze(-1))

        left = candidates & ~important
        distance = self._distances(clean, candidates, position % self.size, block)
        turn, blocks = _turns(distance, left, block)
        wanted = -(-standing // self.size).unsqueeze(-1)
        # Turn t of m is taken when t * wanted / m passes a whole number: `wanted` of them, evenly spread.
        passed = (turn * wanted) % blocks.clamp(min=1) < wanted
        order = ops.ordered_by(left, passed, -turn, clean)
        chosen = important | (left & (ops.ranks_in(order) < standing.unsqueeze(-1)))
        return ops.top_k(chosen.to(torch.float32), counts, protected, valid, width=slots.width)

    def _distances(self, scores: Scores, candidates: Mask, offset: Tensor, block: Tensor) -> Int64[Tensor, "B H N"]:
        """Count the bits of each entry's block that differ from the anchor's."""
        half = candidates.sum(-1, keepdim=True) // 2
        bits = candidates & (ops.ranks_in(ops.ordered_by(candidates, scores)) < half)
        if self.anchor == "mean":
            ones = ops.region_sums(bits.to(torch.int64), offset, self.size)
            held = ops.region_sums(candidates.to(torch.int64), offset, self.size)
            anchor = (2 * ones > held).gather(-1, offset)
        elif self.anchor == "alternate":
            anchor = offset % 2 == 1
        else:
            anchor = torch.full_like(bits, self.anchor == "ones")
        differs = (candidates & (bits != anchor)).to(torch.int64)
        return ops.region_sums(differs, block, scores.shape[-1]).gather(-1, block)


def _means(scores: Scores, candidates: Mask, block: Tensor) -> Scores:
    """Return each entry's mean score of its block's candidates."""
    count = scores.shape[-1]
    number = ops.region_sums(candidates.to(torch.float64), block, count)
    total = ops.region_sums(scores.to(torch.float64), block, count)
    return ops.levelled((total / number.clamp(min=1)).float(), number > 0).gather(-1, block)


def _turns(distance: Tensor, left: Mask, block: Tensor) -> tuple[Int64[Tensor, "B H N"], Int64[Tensor, "B H 1"]]:
    """Number the blocks with entries left in order of distance, the older first; and say how many there are."""
    count = distance.shape[-1]
    held = ops.region_sums(left.to(torch.int64), block, count) > 0
    far = torch.zeros_like(distance).scatter_(-1, block, distance)
    numbers = torch.arange(count, device=distance.device).expand_as(far)
    turn = ops.ranks_in(ops.ordered_by(held, -far, -numbers))
    return turn.gather(-1, block), held.sum(-1, keepdim=True)
