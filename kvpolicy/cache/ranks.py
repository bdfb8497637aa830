"""Ranks of tensor parallelism that speak through torch.distributed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad


class ProcessGroup:
    """The ranks of a process group, each of which holds as many neighbouring heads of a layer.

    Args:
        group: of torch.distributed, whose ranks are in the order of their heads; None for all processes.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors `[..., H, N]` of all ranks side by side; see `kvpolicy.contracts.ranks.Ranks`."""
        size = dist.get_world_size(self.group)
        slots = torch.tensor([tensor.shape[-1]], device=tensor.device)
        dist.all_reduce(slots, dist.ReduceOp.MAX, group=self.group)  # heads of other ranks may hold more slots
        most = int(slots)
        sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor  # not every backend sends bool
        wide = pad(sent, (0, most - tensor.shape[-1]))
        parts = [torch.empty_like(wide) for _ in range(size)]
        dist.all_gather(parts, wide.contiguous(), group=self.group)
        together = torch.cat(parts, -2)
        return together.to(torch.bool) if tensor.dtype == torch.bool else together
