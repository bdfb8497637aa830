"""Heads keep what was measured to be best at this budget (LU-KV)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch

from kvpolicy.contracts.components import AllocationRequest, BudgetAllocator
from kvpolicy.tables import TableOf, load_table
from kvpolicy.types import Counts
from kvpolicy_plugins.allocators._cells import Cells


class TableCurve(BudgetAllocator):
    """A table says, for several budgets, which share of its entries each head keeps; between them it is interpolated.

    With `F` of `V` unprotected entries to keep, a head with `v` of them keeps its protected entries and others in
    proportion to ``v * kept(F / V)`` (arXiv:2602.08585), rounded by largest remainder; outside the measured budgets the
    nearest one counts. Needs no scores. Raises TableError when the table is of another model.
    """

    paper: ClassVar[str] = "arXiv:2602.08585"
    counts: ClassVar[Literal["equal", "per_layer", "per_head"]] = "per_head"

    table: Annotated[str, TableOf("head_curves")]
    """Table of kind ``head_curves``: its name, or the path of its file."""

    def allocate(self, request: AllocationRequest) -> list[Counts]:
        cells = Cells.of(request)
        table = load_table(self.table, "head_curves")
        points = table.tensors["fractions"].to(cells.total.device, torch.float64)
        kept = cells.here(cells.of_table(table, "kept", request), request).to(torch.float64)
        room = (cells.valid - cells.protected).to(torch.float64)
        free = (cells.total - cells.protected.sum(-1)).to(torch.float64)
        fraction = (free / room.sum(-1).clamp(min=1)).clamp(points[0], points[-1])
        above = torch.searchsorted(points, fraction).clamp(1, max(1, len(points) - 1)).clamp(max=len(points) - 1)
        below = (above - 1).clamp(min=0)
        width = points[above] - points[below]
        along = torch.where(width > 0, (fraction - points[below]) / width.clamp(min=1e-300), 0.0)
        return cells.share(torch.lerp(kept[below], kept[above], along[:, None]) * room)
