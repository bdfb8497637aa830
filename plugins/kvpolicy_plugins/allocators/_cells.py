"""The heads of all layers side by side, as allocators share a budget among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import AllocationRequest
from kvpolicy.tables import Table
from kvpolicy.types import Counts


@dataclass(frozen=True)
class Cells:
    """One cell for each KV head of each layer, layer by layer; `C` cells in all.

    Attributes:
        protected, valid: int64 `[B, C]`, what a head must and can keep.
        total: int64 `[B]`, entries that a row keeps in all cells together.
        heads: KV heads of each layer.
        devices: device of each layer.
    """

    protected: Tensor
    valid: Tensor
    total: Tensor
    heads: list[int]
    devices: list[torch.device]

    @staticmethod
    def of(request: AllocationRequest) -> Cells:
        """Read them off a request, on the device of its budget."""
        home = request.budget.device
        protected = torch.cat([p.to(home) for p in request.protected], -1)
        valid = torch.cat([v.to(home) for v in request.valid], -1)
        heads = [v.shape[-1] for v in request.valid]
        total = torch.minimum(request.budget * sum(heads), valid.sum(-1))
        return Cells(protected, valid, total, heads, [v.device for v in request.valid])

    def layer_totals(self) -> Tensor:
        """Return int64 `[B, L]`, what each layer keeps when all heads keep as much on average."""
        heads = torch.tensor(self.heads, dtype=torch.float64, device=self.total.device)
        low, high = self.per_layer(self.protected), self.per_layer(self.valid)
        return ops.apportion(heads.expand(low.shape), self.total, low, high)

    def per_layer(self, cells: Tensor) -> Tensor:
        """Return the sum over each layer's heads, `[B, L]`."""
        return torch.stack([part.sum(-1) for part in cells.split(self.heads, dim=-1)], -1)

    def share(self, weights: Tensor) -> list[Counts]:
        """Return counts: each head what is protected, and of all other entries in proportion to `weights` `[B, C]`."""
        free = self.total - self.protected.sum(-1)
        room = self.valid - self.protected
        return self.split(self.protected + ops.apportion(weights, free, torch.zeros_like(room), room))

    def of_table(self, table: Table, name: str, request: AllocationRequest) -> Tensor:
        """Return a table's numbers for all heads of these layers, also those of other ranks, fp32 `[A]` or `[P, A]`.

        Raises TableError if it is of another model.
        """
        totals = {span.total for span in request.head_spans}
        for total in totals:  # a table has as many heads in every layer
            table.check_model(request.num_layers, total)
        rows = table.rows(name, request.layers, request.num_layers, totals.pop(), self.total.device)
        return rows.flatten(-2)

    def here(self, numbers: Tensor, request: AllocationRequest) -> Tensor:
        """Return the numbers of the heads that are here, `[..., C]` of `[..., A]`."""
        spans = request.head_spans
        parts = numbers.split([span.total for span in spans], dim=-1)
        return torch.cat([span.of(part, -1) for span, part in zip(spans, parts, strict=True)], -1)

    def split(self, counts: Tensor) -> list[Counts]:
        """Return `[B, C]` counts as one `[B, H]` tensor per layer, where that layer is."""
        parts = counts.split(self.heads, dim=-1)
        return [part.to(device) for part, device in zip(parts, self.devices, strict=True)]
