"""The same for everybody."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from kvpolicy.contracts.components import AllocationRequest, BudgetAllocator
from kvpolicy.types import Counts


class Uniform(BudgetAllocator):
    """Every layer and KV head keeps the budget, or all it has when that is less."""

    counts: ClassVar[Literal["equal", "per_layer", "per_head"]] = "equal"

    def allocate(self, request: AllocationRequest) -> list[Counts]:
        return [
            torch.minimum(request.budget.to(valid.device)[:, None], valid).to(torch.int64) for valid in request.valid
        ]
