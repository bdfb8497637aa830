"""All heads of all layers compete for one budget (KVzip)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvpolicy.contracts.components import AllocationRequest, BudgetAllocator
from kvpolicy.types import Counts
from kvpolicy_plugins.allocators._cells import Cells
from kvpolicy_plugins.allocators._pools import Normalise, pooled_shares


class GlobalPool(BudgetAllocator):
    """A head keeps as many entries as it has in one ranking over all layers and heads (arXiv:2505.23416).

    With `F` unprotected entries to keep in `C` heads of all layers, `t` of the `F` highest scores lie in a head; it
    keeps its protected entries and ``(1 - floor) * t + floor * F / C`` others, rounded by largest remainder. A head may
    keep nothing but what is protected. Needs scores that are comparable across layers and heads, or `normalise`. Cost:
    one sort of all scores.
    """

    paper: ClassVar[str] = "arXiv:2505.23416"
    scores_needed: ClassVar[Literal["none", "layer", "model"]] = "model"
    counts: ClassVar[Literal["equal", "per_layer", "per_head"]] = "per_head"

    floor: float = Field(default=0.0, ge=0, le=1)
    """Weight of the equal share in the blend: 0 = all by rank, as the paper has it, 1 = the same for all heads."""
    normalise: Normalise = "none"
    """Scores of a head before they are pooled, as in `adaptive_heads`: `z_score`, `concentration` or `none`."""

    @property
    def normalises(self) -> bool:
        return self.normalise == "z_score"

    def allocate(self, request: AllocationRequest) -> list[Counts]:
        cells = Cells.of(request)
        free = cells.total - cells.protected.sum(-1)
        candidates = [mask & ~kept for mask, kept in zip(request.masks, request.protected_masks, strict=True)]
        shares = pooled_shares(request.scores, candidates, free, self.normalise, self.floor)
        return cells.share(shares)
