"""Choosing by regions: spans of positions that share a quota or stand and fall together."""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from kvpolicy.ops.apportion import apportion
from kvpolicy.types import Counts, Mask, Scores


def ordered_by(*keys: Tensor) -> Int64[Tensor, "*rows N"]:
    """Return the order that sorts by the first key, then the second and so on, descending; ties to the lower slot.

    Args:
        keys: `[..., N]` each, of any dtype, without NaN.

    Returns:
        int64 `[..., N]`, a permutation of the slots.
    """
    order = keys[-1].sort(dim=-1, descending=True, stable=True).indices
    for key in reversed(keys[:-1]):
        order = order.gather(-1, key.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
    return order


def ranks_in(order: Int64[Tensor, "*rows N"]) -> Int64[Tensor, "*rows N"]:
    """Return the place of each slot in an order, from 0."""
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


def numbered(chunk: Int64[Tensor, "B H N"], valid: Mask) -> Int64[Tensor, "B H N"]:
    """Number the chunks that occur, from 0 in order; a slot that is not valid gets the number of the one before.

    Args:
        chunk: which chunk a slot lies in, not negative and not falling over the valid slots; other slots are not read.
        valid: bool `[B, H, N]`.

    Returns:
        int64 `[B, H, N]`, below `N`.
    """
    reached = torch.where(valid, chunk, -1).cummax(dim=-1).values
    before = torch.nn.functional.pad(reached, (1, 0), value=-1)[..., :-1]
    return ((reached != before).cumsum(-1) - 1).clamp(min=0)


def region_sums(values: Tensor, region: Int64[Tensor, "B H N"], regions: int) -> Tensor:
    """Add up `[B, H, N]` by region, `[B, H, regions]`, in the dtype of `values`."""
    sums = values.new_zeros(*values.shape[:2], regions)
    return sums.scatter_add_(-1, region, values)


def quota_mask(
    scores: Scores,
    counts: Counts,
    protected: Mask,
    valid: Mask,
    region: Int64[Tensor, "B H N"],
    weights: Float64[Tensor, "B H R"],
) -> Mask:
    """Keep the protected slots, and of every region its quota of those with the highest scores.

    What is left of `counts` besides the protected slots is shared by `apportion` in proportion to `weights`; no region
    gets more than it has. Equal scores go to the lowest slot.

    Args:
        scores: fp32 `[B, H, N]`, finite where `valid`.
        counts: int64 `[B, H]`, `protected.sum(-1) <= counts <= valid.sum(-1)`.
        protected: bool `[B, H, N]`, valid slots only.
        valid: bool `[B, H, N]`.
        region: int64 `[B, H, N]` in `[0, R)`.
        weights: fp64 `[B, H, R]`, not negative.

    Returns:
        bool `[B, H, N]` with `counts` marks per head.
    """
    candidates = valid & ~protected
    size = region_sums(candidates.to(torch.int64), region, weights.shape[-1])
    quota = apportion(weights, counts - protected.sum(-1), torch.zeros_like(size), size)
    order = ordered_by(candidates, -region, torch.where(candidates, scores, 0.0))
    rank = ranks_in(order) - (size.cumsum(-1) - size).gather(-1, region)
    return protected | (candidates & (rank < quota.gather(-1, region)))
