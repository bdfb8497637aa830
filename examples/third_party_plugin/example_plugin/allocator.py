"""A budget allocator: how many entries each layer and KV head keeps; integers that sum exactly to the budget."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy.contracts.components import AllocationRequest, BudgetAllocator
from kvpolicy.types import Counts


class ExamplePluginSlope(BudgetAllocator):
    """Later layers keep less.

    Every head pays a rising price for each further entry, `n / weight` for the n-th, and the cheapest are bought until
    the budget is spent: the sum is exact, and no head gets less than is protected or more than it has.
    """

    counts: ClassVar[Literal["equal", "per_layer", "per_head"]] = "per_head"

    ratio: float = Field(default=0.5, gt=0, le=1)
    """What the last layer keeps, as a share of what the first one keeps; 1 is the same for all."""

    def allocate(self, request: AllocationRequest) -> list[Counts]:
        """Return int64 `[B, H]` per layer with `protected <= count <= valid`."""
        home, last = request.budget.device, max(request.num_layers - 1, 1)
        prices = []
        for layer, valid, protected in zip(request.layers, request.valid, request.protected, strict=True):
            weight = 1.0 - (1.0 - self.ratio) * layer / last
            n = torch.arange(1, int(valid.max()) + 1, device=home)
            price = (n / weight).expand(*valid.shape, -1)
            price = price.masked_fill(n <= protected.to(home)[..., None], 0.0)
            prices.append(price.masked_fill(n > valid.to(home)[..., None], math.inf))
        heads = sum(valid.shape[1] for valid in request.valid)
        have = sum(valid.to(home).sum(1) for valid in request.valid)
        total = torch.minimum(request.budget * heads, torch.as_tensor(have, device=home))
        order = torch.cat([price.flatten(1) for price in prices], 1).argsort(dim=1, stable=True)
        bought = order.argsort(dim=1) < total[:, None]
        parts = bought.split([price[0].numel() for price in prices], dim=1)
        return [
            part.view(price.shape).sum(-1).to(valid.device)
            for part, price, valid in zip(parts, prices, request.valid, strict=True)
        ]
