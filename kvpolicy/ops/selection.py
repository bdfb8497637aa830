"""Choosing slots by score, with exact counts and defined ties."""

from __future__ import annotations

import torch

from kvpolicy.ops.dispatch import dispatched
from kvpolicy.ops.order import in_order
from kvpolicy.types import Counts, KeepIndices, Mask, Scores


@dispatched
def top_k(scores: Scores, counts: Counts, protected: Mask, valid: Mask, *, width: int | None = None) -> KeepIndices:
    """Keep the protected slots and then those with the highest scores, exactly `counts` of them per head.

    Args:
        scores: fp32 `[B, H, N]`; higher = keep. Equal scores go to the lowest slot; NaN ranks below every finite score.
        counts: int64 `[B, H]`, `protected & valid <= counts <= valid` in number.
        protected: bool `[B, H, N]`; only valid slots are protected.
        valid: bool `[B, H, N]`; no other slot is kept.
        width: `K`, at least the largest count; read from the device when not given.

    Returns:
        `indices` int64 `[B, H, K]`, ascending, padded with the last kept slot (0 if none is); `lengths` are the counts.
    """
    slots = scores.shape[-1]
    columns = (int(counts.max()) if counts.numel() else 0) if width is None else width
    # Whatever a valid slot scores, it ranks above the others and below the protected ones.
    lowest, highest = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    finite = scores.nan_to_num(nan=lowest, neginf=lowest, posinf=highest)
    ranked = finite.masked_fill_(~valid, float("-inf")).masked_fill_(protected & valid, float("inf"))
    _, order = in_order(ranked, descending=True)
    first = torch.arange(slots, device=scores.device) < counts.unsqueeze(-1)
    kept = torch.zeros_like(valid).scatter_(-1, order, first)
    return _ascending(kept, counts, columns)


def _ascending(kept: Mask, counts: Counts, columns: int) -> KeepIndices:
    """Turn a mask with `counts` marks per head into ascending slots, padded with the last one."""
    slot = torch.arange(kept.shape[-1], device=kept.device)
    marked = torch.where(kept, slot, 0)
    last = marked.amax(dim=-1, keepdim=True) if kept.shape[-1] else counts.new_zeros(counts.shape).unsqueeze(-1)
    column = (kept.cumsum(dim=-1) - 1).masked_fill(~kept, columns)
    indices = last.repeat(1, 1, columns + 1).scatter_(-1, column, marked)[..., :columns]
    return KeepIndices(indices.contiguous(), counts)
