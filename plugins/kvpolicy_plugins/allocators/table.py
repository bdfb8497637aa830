"""Heads keep what was measured that they need (HeadKV)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy.contracts.components import AllocationRequest, BudgetAllocator
from kvpolicy.tables import TableOf, load_table
from kvpolicy.types import Counts
from kvpolicy_plugins.allocators._cells import Cells


class TableShares(BudgetAllocator):
    """A part of the budget is the same for all heads, the rest follows a table of scores over all layers and heads.

    With `F` unprotected entries to keep in `C` heads and ``p = s^temperature / sum(s^temperature)`` a head keeps its
    protected entries and ``(1 - 1/beta) * F / C + p * F / beta`` others (arXiv:2410.19258), rounded by
    largest remainder; the released code rounds every head by itself. What a head has no entries for goes to the others
    in proportion. Needs no scores. Raises TableError when the table is of another model.
    """

    paper: ClassVar[str] = "arXiv:2410.19258"
    counts: ClassVar[Literal["equal", "per_layer", "per_head"]] = "per_head"

    table: Annotated[str, TableOf("head_scores")]
    """Table of kind ``head_scores``: its name, or the path of its file."""
    beta: float = Field(default=1.5, ge=1, allow_inf_nan=False)
    """1/beta of the unprotected budget follows the table: 1 = all of it."""
    temperature: float = Field(default=1.0, gt=0, le=16)
    """Exponent of the scores: above 1 the best heads get more, below 1 the shares come closer."""

    def allocate(self, request: AllocationRequest) -> list[Counts]:
        cells = Cells.of(request)
        table = load_table(self.table, "head_scores")
        scores = cells.of_table(table, "scores", request).to(torch.float64)
        part = (scores / scores.amax().clamp(min=1e-300)) ** self.temperature
        part = part / part.sum().clamp(min=1e-300)
        equal = 1 / part.numel()
        share = (1 - 1 / self.beta) * equal + part / self.beta
        return cells.share(cells.here(share, request).expand(cells.valid.shape))
