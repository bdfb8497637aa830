"""Gathering what is kept to the front of its storage."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.ops.dispatch import dispatched
from kvpolicy.types import KeepIndices


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
    row = torch.arange(batch, device=tensor.device)[:, None, None]
    head = torch.arange(heads, device=tensor.device)[None, :, None]
    tensor[:, :, :columns] = tensor[row, head, kept.indices]
