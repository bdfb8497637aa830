"""Heads compete for their layer's budget (AdaKV)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import AllocationRequest, BudgetAllocator
from kvpolicy.types import Counts
from kvpolicy_plugins.allocators._cells import Cells
from kvpolicy_plugins.allocators._pools import Normalise, pooled_shares


class AdaptiveHeads(BudgetAllocator):
    """Each layer keeps the budget; inside it a head keeps as many entries as it has in the layer's common ranking.

    With `F` unprotected entries to keep in a layer of `H` heads, `t_h` of the `F` highest scores lie in head `h`; it
    keeps its protected entries and ``(1 - floor) * t_h + floor * F / H`` others (arXiv:2407.11550, with the
    authors' safeguard), rounded by largest remainder: the released code rounds every head by itself and misses the
    sum. What a head has no entries for goes to the others in proportion; of equal scores the oldest count first.
    Needs scores that are comparable across heads, or `normalise`. Cost: one sort of a layer's scores.
    """

    paper: ClassVar[str] = "arXiv:2407.11550"
    scores_needed: ClassVar[Literal["none", "layer", "model"]] = "layer"
    counts: ClassVar[Literal["equal", "per_layer", "per_head"]] = "per_head"

    floor: float = Field(default=0.2, ge=0, le=1)
    """Weight of the equal share in the blend, the authors' `floor`: 0 = all by rank, 1 = the same for all heads."""
    normalise: Normalise = "none"
    """Scores of a head before they are pooled: `z_score` (of its unprotected entries; makes any scores comparable),
    `concentration` (times the share of its mass that its top entries hold, as the authors' code can), or `none`."""

    @property
    def normalises(self) -> bool:
        return self.normalise == "z_score"

    def allocate(self, request: AllocationRequest) -> list[Counts]:
        cells = Cells.of(request)
        protected = cells.protected.split(cells.heads, -1)
        valid = cells.valid.split(cells.heads, -1)
        counts = []
        for layer, total in enumerate(cells.layer_totals().unbind(-1)):
            low = protected[layer]
            free = total - low.sum(-1)
            candidates = request.masks[layer] & ~request.protected_masks[layer]
            shares = pooled_shares([request.scores[layer]], [candidates], free, self.normalise, self.floor)
            counts.append(low + ops.apportion(shares, free, torch.zeros_like(low), valid[layer] - low))
        return cells.split(torch.cat(counts, -1))
