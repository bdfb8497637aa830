"""Early layers keep more than late ones (PyramidKV)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import AllocationRequest, BudgetAllocator
from kvpolicy.types import Counts
from kvpolicy_plugins.allocators._cells import Cells


class Pyramid(BudgetAllocator):
    """The budget falls linearly from the first to the last layer; all heads of a layer keep as much.

    What is protected stays in every layer. The other `k` entries per head become `k * (2 - 1/beta)` in the first
    layer and `k / beta` in the last (arXiv:2406.02069), rounded by largest remainder, so that the
    sum over the layers is the budget to the entry. What a layer has no entries for goes to the others in proportion.
    Layers that are not evicted from are not counted. Needs no scores; cost linear in the layers.
    """

    paper: ClassVar[str] = "arXiv:2406.02069"
    shorthand: ClassVar[str | None] = "beta"
    counts: ClassVar[Literal["equal", "per_layer", "per_head"]] = "per_layer"

    beta: float = Field(default=20.0, ge=1, allow_inf_nan=False)
    """The last layer's share of the unprotected budget is 1/beta; 1 is the same for all layers."""

    def allocate(self, request: AllocationRequest) -> list[Counts]:
        cells = Cells.of(request)
        layers = len(cells.heads)
        low = torch.stack([part.amax(-1) for part in cells.protected.split(cells.heads, -1)], -1)
        high = torch.stack([part.amax(-1) for part in cells.valid.split(cells.heads, -1)], -1)
        last = 1 / self.beta
        share = torch.linspace(2 - last, last, layers, dtype=torch.float64, device=low.device)
        if layers == 1:
            share = torch.ones_like(share)
        free = request.budget * layers - low.sum(-1)
        each = low + ops.apportion(share.expand(low.shape), free, torch.zeros_like(low), high - low)
        heads = torch.tensor(cells.heads, device=low.device)
        counts = each.repeat_interleave(heads, -1, output_size=sum(cells.heads))
        # Changes nothing while the heads of a layer hold equally many and all layers have as many heads.
        return cells.split(ops.apportion(counts.to(torch.float64), cells.total, cells.protected, cells.valid))
