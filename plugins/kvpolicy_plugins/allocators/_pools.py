"""The scores of several heads in one ranking."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.types import Mask, Scores

Normalise = Literal["none", "concentration", "z_score"]


def pooled_shares(
    scores: list[Scores], candidates: list[Mask], free: Tensor, normalise: Normalise, floor: float
) -> Tensor:
    """Return what each head earns of `free` entries in one ranking of all heads, blended with equal shares.

    Args:
        scores: fp32 `[B, H, N]` of each layer that is pooled.
        candidates: bool `[B, H, N]`, the entries that compete.
        free: int64 `[B]`, entries that stay of all candidates.
        normalise: how scores are made comparable, see `AdaptiveHeads.normalise`.
        floor: weight of the equal share in [0, 1].

    Returns:
        fp64 `[B, C]`, the heads of all layers side by side; each row adds up to `free`, if there are so many.
    """
    home, heads = free.device, [s.shape[1] for s in scores]
    cells = sum(heads)
    flat, taking_part, owners = [], [], []
    first = 0
    for score, mask in zip(scores, candidates, strict=True):
        ready = _normalised(score, mask, (free // cells).to(score.device), normalise)
        # Slot by slot rather than head by head: of equal scores the oldest win, and heads share them evenly.
        flat.append(ready.transpose(1, 2).flatten(1).to(home))
        taking_part.append(mask.transpose(1, 2).flatten(1).to(home))
        owners.append(torch.arange(first, first + score.shape[1], device=home).repeat(score.shape[2]))
        first += score.shape[1]
    together, competing = torch.cat(flat, 1), torch.cat(taking_part, 1)
    # Heads were levelled each by itself; here scores of different heads are ranked.
    together = ops.levelled(together.unsqueeze(1), competing.unsqueeze(1)).squeeze(1)
    counts = ops.pooled_counts(together, torch.cat(owners), competing, free, cells)
    return (1 - floor) * counts.to(torch.float64) + floor * free.to(torch.float64)[:, None] / cells


def _normalised(scores: Scores, mask: Mask, count: Tensor, how: Normalise) -> Scores:
    if how == "none":
        return scores
    if how == "z_score":
        return ops.z_scores(scores, mask)
    clean = torch.where(mask, scores, 0.0).to(torch.float64)
    ranked = clean.clamp(min=0).sort(dim=-1, descending=True).values
    leading = torch.arange(ranked.shape[-1], device=ranked.device) < count[:, None, None]
    mass = ranked.sum(-1, keepdim=True)
    top = ranked.masked_fill(~leading, 0.0).sum(-1, keepdim=True)
    return (clean * torch.where(mass > 0, top / mass.clamp(min=1e-300), 0.0)).to(torch.float32)
