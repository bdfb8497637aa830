"""Gathering what is kept to the front of its storage."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvpolicy.ops.dispatch import dispatched
from kvpolicy.types import KeepIndices

_WIDE = 1 << 12
"""Numbers of a head from which on a CPU gathers head by head: they stay in a core's cache until they are written, where
those of all heads would take fresh pages each time."""


@dispatched
def compact(tensor: Tensor, kept: KeepIndices) -> None:
    """Move the kept slots of `tensor` to the front, in place.

    Slots `0 ... K-1` are written, those behind keep what they held; columns past `kept.lengths` repeat the last kept
    slot and are for the caller to mark as free.

    Args:
        tensor: `[B, H, capacity, ...]`, any dtype: keys, values, positions or slot state.
        kept: indices `[B, H, K]` with `K <= capacity`.
    """
    batch, heads, columns = kept.indices.shape
    if tensor.device.type == "cpu" and columns * math.prod(tensor.shape[3:]) >= _WIDE:
        for b in range(batch):
            for h in range(heads):
                tensor[b, h, :columns] = tensor[b, h].index_select(0, kept.indices[b, h])
        return
    row = torch.arange(batch, device=tensor.device)[:, None, None]
    head = torch.arange(heads, device=tensor.device)[None, :, None]
    tensor[:, :, :columns] = tensor[row, head, kept.indices]
