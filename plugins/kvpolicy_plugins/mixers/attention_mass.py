"""Blocks with most of the attention, then those whose keys differ (OpenVINO's adaptive R-KV)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import Mixer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Mask, Scores

_TINY = 1e-15
_ROWS = 64
_TILE = {"cpu": 1 << 18}
_TILE_ELSEWHERE = 1 << 24


class AttentionMass(Mixer):
    """The fewest blocks that hold a share of the importance come first, by their sums; the others by their diversity.

    Block `c` holds the original positions ``c * size ... c * size + size - 1``; its entries get one number, so that
    they stay or go together (``selector: {use: chunks, size: 16}`` keeps whole blocks). The diversity of a block is
    minus the sum over its keys of the mean cosine to the keys of all blocks that are not among the first; cosines below
    a key's mean cosine count as 0, its own too. Sinks and the newest entries take no part. The numbers only rank: above
    1 for the first blocks, from 0 to 1 for the others. O(N^2 D) operations, O(N) memory.
    """

    same_for_layers: ClassVar[bool] = True
    uses_redundancy: ClassVar[bool] = False
    keeps_comparability: ClassVar[bool] = False
    shorthand: ClassVar[str | None] = "mass"

    mass: float = Field(default=0.9, ge=0, le=1)
    """Share of a head's importance that the first blocks hold together."""
    size: int = Field(default=16, ge=1)
    """Tokens per block."""
    sinks: int = Field(default=0, ge=0)
    """Positions from the start of the row that are kept by a protection and take no part."""
    recent: int = Field(default=0, ge=0)
    """So many of the newest entries are kept by a protection and take no part."""

    def mix(self, importance: Scores, redundancy: Scores, view: CacheView) -> Scores:
        takes_part = view.valid & ~view.newest(self.recent) & (view.positions >= self.sinks)
        count = view.shape[2]
        block = ops.numbered(view.positions.to(torch.int64) // self.size, view.valid)
        clean = torch.where(takes_part, ops.from_lowest(importance, takes_part), 0.0)
        sums = ops.region_sums(clean.to(torch.float64), block, count)
        held = ops.region_sums(takes_part.to(torch.int64), block, count) > 0
        level = ops.levelled(sums.float(), held)
        order = ops.ordered_by(held, level, -torch.arange(count, device=view.device).expand_as(level))
        before = sums.gather(-1, order).cumsum(-1) - sums.gather(-1, order)
        total = sums.sum(-1, keepdim=True)
        # A block is among the first while those before it fall short of the share by more than rounding.
        short = before < self.mass * total * (1 - ops.ROUNDING)
        first = torch.zeros_like(held).scatter_(-1, order, short) & held
        others = takes_part & ~first.gather(-1, block)
        near = near_sums(view.keys, takes_part, others)
        alike = ops.region_sums(near.to(torch.float64), block, count) / others.sum(-1, keepdim=True).clamp(min=1)
        diverse = ops.min_max(-alike.float(), held & ~first)
        mixed = torch.where(first, 2.0 + ops.by_maximum(level, held), diverse).gather(-1, block)
        unknown = view.valid & ~importance.isfinite()
        return torch.where(takes_part, mixed, 0.0).masked_fill(unknown, float("nan"))


def near_sums(keys: Tensor, rows: Mask, columns: Mask) -> Scores:
    """Sum over some keys the cosines to each key that are not below that key's mean cosine.

    Args:
        keys: `[B, H, N, D]`, any float dtype.
        rows: bool `[B, H, N]`, the keys that have a result, and over which a key's mean is taken, itself as 0.
        columns: bool `[B, H, N]`, those of them that are summed over.

    Returns:
        fp32 `[B, H, N]`, 0 where `rows` is False.
    """
    flat, taking, counted = keys.flatten(0, 1), rows.flatten(0, 1), columns.flatten(0, 1)
    result = torch.zeros(taking.shape, dtype=torch.float32, device=keys.device)
    count = flat.shape[1]
    tile = _TILE.get(keys.device.type, _TILE_ELSEWHERE)
    some = max(1, tile // max(count * min(_ROWS, count), 1))
    for head in range(0, len(flat), some):
        heads = slice(head, head + some)
        plain = torch.where(taking[heads].unsqueeze(-1), flat[heads], 0).float()
        unit = plain / torch.linalg.vector_norm(plain, dim=-1, keepdim=True).clamp_(min=_TINY)
        number = taking[heads].sum(-1)[:, None, None].clamp(min=1)
        for start in range(0, count, _ROWS):
            cosines = unit[:, start : start + _ROWS] @ unit.transpose(1, 2)
            cosines.diagonal(start, 1, 2).zero_()
            mean = cosines.sum(-1, keepdim=True) / number
            kept = torch.where((cosines >= mean) & counted[heads].unsqueeze(1), cosines, 0.0)
            # No cosine is above a mean that is no number, and the sum would be 0.
            result[heads, start : start + _ROWS] = kept.sum(-1).masked_fill(mean.squeeze(-1).isnan(), float("nan"))
    return torch.where(taking, result, 0.0).view(rows.shape)
