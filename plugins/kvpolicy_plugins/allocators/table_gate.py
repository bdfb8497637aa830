"""Some heads keep much, the others their sinks and their window (DuoAttention, RLKV)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy.contracts.components import AllocationRequest, BudgetAllocator
from kvpolicy.tables import TableOf, load_table
from kvpolicy.types import Counts
from kvpolicy_plugins.allocators._cells import Cells


class TableGate(BudgetAllocator):
    """The heads with the highest scores in a table are retrieval heads, all others are streaming heads.

    Streaming heads keep what is protected, their sinks and their recent window; retrieval heads keep all that the
    budget allows, the same for each (arXiv:2410.10819). Only what retrieval heads have no entries for goes
    to streaming heads, so the sum is exact. Needs no scores. Raises TableError when the table is of another model.
    """

    paper: ClassVar[str] = "arXiv:2410.10819 (DuoAttention), arXiv:2510.08525 (RLKV)"
    counts: ClassVar[Literal["equal", "per_layer", "per_head"]] = "per_head"

    table: Annotated[str, TableOf("head_scores")]
    """Table of kind ``head_scores``: its name, or the path of its file."""
    retrieval: float = Field(default=0.5, gt=0, le=1)
    """Share of all heads that are retrieval heads, rounded; of equal scores the earlier heads."""

    def allocate(self, request: AllocationRequest) -> list[Counts]:
        cells = Cells.of(request)
        table = load_table(self.table, "head_scores")
        scores = cells.of_table(table, "scores", request)
        chosen = scores.sort(descending=True, stable=True).indices[: max(1, round(self.retrieval * scores.numel()))]
        gate = torch.zeros_like(scores).index_fill_(0, chosen, 1.0)
        return cells.share(cells.here(gate, request).expand(cells.valid.shape))
