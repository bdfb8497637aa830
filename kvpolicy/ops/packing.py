"""Slots side by side: a hole between two of them must not change what is a neighbour, a window or a chunk."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor


def pack(x: Tensor, mask: Bool[Tensor, "*dims N"], fill: float = 0.0) -> Tensor:
    """Move the slots of `mask` to the front, in order.

    Args:
        x: `[..., N]` or `[..., N, D]`, any dtype; what stands outside the mask is not read.
        mask: bool `[..., N]`, broadcastable to the slots of `x`.
        fill: what the slots behind them hold.

    Returns:
        A new tensor, shaped and typed as `x`.
    """
    count = mask.shape[-1]
    slots = x.shape if x.dim() == mask.dim() else x.shape[:-1]
    rank = (mask.cumsum(dim=-1) - 1).masked_fill(~mask, count).expand(slots)
    room = x.new_full((*slots[:-1], count + 1, *x.shape[len(slots) :]), fill)
    axis = len(slots) - 1
    if x.dim() > len(slots):
        rank = rank.unsqueeze(-1).expand(x.shape)
    return room.scatter_(axis, rank, x).narrow(axis, 0, count)


def unpack(packed: Tensor, mask: Bool[Tensor, "*dims N"], fill: float = 0.0) -> Tensor:
    """Move numbers per slot `[..., N]` back to where `pack` took them from; `fill` outside the mask."""
    rank = (mask.cumsum(dim=-1) - 1).clamp(min=0).expand(packed.shape)
    return packed.gather(-1, rank).masked_fill(~mask, fill)
