"""Folding the values of evicted entries into those that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.ops.selection import top_k
from kvpolicy.types import KeepIndices, Keys, Mask, Values

_CELLS = 1 << 23


def merged_values(keys: Keys, values: Values, valid: Mask, kept: KeepIndices, threshold: float) -> Values:
    """Return the values after each evicted one has been folded into the nearest entry that stays.

    Nearest is by the cosine of the keys, equal ones to the lowest slot. With ``w = max(cosine, 0) * |v| / (|v| +
    |v_s|)`` for every evicted `v` whose cosine to its nearest `s` is at least `threshold`, ``v_s`` becomes
    ``(v_s + sum(w * v)) / (1 + sum(w))``. Sums are fp32. Evicted entries are taken in blocks, so that at most about
    2^23 similarities exist at a time.

    Args:
        keys: `[B, H, N, D]`.
        values: `[B, H, N, Dv]`.
        valid: bool `[B, H, N]`; other slots are not read.
        kept: the slots that stay.
        threshold: smallest cosine at which values are merged, not negative.

    Returns:
        `[B, H, N, Dv]`, the dtype of `values`; slots that receive nothing are returned as they are.
    """
    batch, heads, slots = valid.shape
    stays = kept.mask(slots) & valid
    going = valid & ~stays
    gone = top_k(going.to(torch.float32), going.sum(-1), torch.zeros_like(going), going)
    columns, rows = kept.indices.shape[-1], gone.indices.shape[-1]
    if columns == 0 or rows == 0:
        return values
    lives = torch.arange(columns, device=keys.device) < kept.lengths.unsqueeze(-1)
    leaves = torch.arange(rows, device=keys.device) < gone.lengths.unsqueeze(-1)
    towards = _unit(_at(keys, kept.indices, lives)).transpose(-1, -2)
    away = _unit(_at(keys, gone.indices, leaves))
    old, given = _at(values, kept.indices, lives), _at(values, gone.indices, leaves)
    size, share = old.norm(dim=-1), given.norm(dim=-1)
    added, weight = torch.zeros_like(old), torch.zeros_like(size)
    column = torch.arange(columns, device=keys.device)
    block = max(1, _CELLS // (batch * heads * columns))
    for start in range(0, rows, block):
        part = slice(start, start + block)
        # A column that is no survivor holds zeros: its cosine is 0, and at most 0 nothing is merged.
        nearest, target = (away[:, :, part] @ towards).max(dim=-1)
        moves = leaves[:, :, part] & (nearest >= threshold)
        lost = share[:, :, part]
        amount = nearest.clamp(min=0) * lost / (lost + size.gather(-1, target)).clamp(min=1e-30)
        amount = torch.where(moves, amount, 0.0)
        # A product with 0s and weights instead of a scatter: the order of the sum, and so the result, is fixed.
        assigned = torch.where(column == target.unsqueeze(-1), amount.unsqueeze(-1), 0.0).transpose(-1, -2)
        added += assigned @ given[:, :, part]
        weight += assigned.sum(-1)
    merged = ((old + added) / (1 + weight).unsqueeze(-1)).to(values.dtype)
    received = lives & (weight > 0)
    index = kept.indices.masked_fill(~received, slots)
    room = torch.cat([values, values[:, :, :1]], dim=2)
    room.scatter_(2, index.unsqueeze(-1).expand_as(merged), merged)
    return room[:, :, :slots]


def _at(x: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
    """Gather slots `[B, H, K]` of `[B, H, N, D]` in fp32; 0 outside the mask."""
    found = x.gather(2, slots.unsqueeze(-1).expand(*slots.shape, x.shape[-1]))
    return torch.where(mask.unsqueeze(-1), found, 0.0).to(torch.float32)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)
