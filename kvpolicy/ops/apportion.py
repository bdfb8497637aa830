"""Integers that add up: sharing a budget, exactly and within bounds."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

_GRID = 2.0**20
_NOTHING = 1e-15


def apportion(
    weights: Float[Tensor, "*rows n"],
    total: Int[Tensor, "*rows"],
    low: Int[Tensor, "*rows n"],
    high: Int[Tensor, "*rows n"],
) -> Int64[Tensor, "*rows n"]:
    """Share `total` in proportion to `weights`, in integers that add up to it, each between `low` and `high`.

    The real-valued shares are ``clamp(a * weight, low, high)`` with the one `a` that makes them add up: what a cell
    cannot take, or has to take, is borne by the others in proportion. They are then rounded by largest remainder: down,
    and the units that are missing go to the largest fractions. Fractions are compared on a grid of 2^-20, equal ones
    favour the lower index. Memory is linear in the number of cells.

    Args:
        weights: floating point, finite, not negative. A cell with weight 0 gets more than `low` only when all others
            are full; when all are 0, all count alike.
        total: an integer per row; brought into ``[low.sum(), high.sum()]``.
        low: integers, ``0 <= low <= high``.
        high: integers, together less than 2^40.

    Returns:
        int64, the shape of `weights`; each row is shared as if it were alone.
    """
    least, most = low.to(torch.float64), high.to(torch.float64)
    wanted = torch.maximum(torch.minimum(total.to(torch.float64), most.sum(-1)), least.sum(-1)).unsqueeze(-1)
    if weights.shape[-1] == 0:
        return low.to(torch.int64)
    weight = weights.to(torch.float64)
    largest = weight.amax(-1, keepdim=True)
    weight = torch.where(largest > 0, (weight / largest).clamp(min=_NOTHING), 1.0)
    scale = _scale(weight, wanted, least, most)
    shares = torch.maximum(torch.minimum(scale * weight, most), least)
    # On the grid, rounding errors neither decide a tie nor let a share that is an integer fall to the one below.
    shares = (shares * _GRID).round() / _GRID
    whole = shares.floor()
    missing = (wanted - whole.sum(-1, keepdim=True)).to(torch.int64)
    order = (shares - whole).sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, place)
    return whole.to(torch.int64) + (rank < missing)


def _scale(weight: Tensor, wanted: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return `a` with ``clamp(a * weight, low, high).sum() == wanted``, fp64 `[..., 1]`."""
    bends = torch.cat([low / weight, high / weight], -1).sort(dim=-1).values

    def shares(scale: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(scale * weight, high), low)

    # Search the last bend whose sum is not above what is wanted; between two bends the sum is a straight line.
    first, beyond = (
        torch.zeros_like(wanted, dtype=torch.int64),
        torch.full_like(wanted, bends.shape[-1], dtype=torch.int64),
    )
    for _ in range(bends.shape[-1].bit_length()):
        middle = (first + beyond) // 2
        reached = shares(bends.gather(-1, middle.clamp(max=bends.shape[-1] - 1))).sum(-1, keepdim=True) <= wanted
        first, beyond = torch.where(reached, middle, first), torch.where(reached, beyond, middle)
    start = bends.gather(-1, first)
    rising = (start >= low / weight) & (start < high / weight)
    slope = weight.masked_fill(~rising, 0.0).sum(-1, keepdim=True)
    rest = wanted - shares(start).masked_fill(rising, 0.0).sum(-1, keepdim=True)
    return torch.where(slope > 0, rest / slope.clamp(min=_NOTHING), start)


def pooled_counts(
    scores: Float[Tensor, "B M"],
    owner: Int[Tensor, " M"],
    candidates: Tensor,
    total: Int[Tensor, " B"],
    cells: int,
) -> Int64[Tensor, "B cells"]:
    """Count whose entries are among the `total` highest of a row; equal scores go to the lower index.

    Args:
        scores: fp32 `[B, M]`, finite where `candidates`; entries of all cells in one list.
        owner: int64 `[M]`, the cell that each entry belongs to.
        candidates: bool `[B, M]`, the entries that take part.
        total: integers `[B]`; more than there are candidates means all.
        cells: number of cells.

    Returns:
        int64 `[B, cells]`; each row adds up to `total`, or to the number of its candidates.
    """
    ranked = torch.where(candidates, scores, float("-inf"))
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    taken = torch.arange(order.shape[-1], device=order.device) < total.unsqueeze(-1)
    taken = taken & candidates.gather(-1, order)
    counts = torch.zeros(scores.shape[0], cells, dtype=torch.int64, device=scores.device)
    return counts.scatter_add_(-1, owner[order], taken.to(torch.int64))
