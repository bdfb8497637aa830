"""Kernel density of keys: how many others point nearly the same way."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.types import Keys, Mask, Scores

_TINY = 1e-30
_TILE = 1 << 17  # numbers of a tile, so that it stays in a core's cache
_ROWS = 64


def key_density(keys: Keys, valid: Mask, *, bandwidth: float) -> Scores:
    """Sum over the valid keys `j != i` of ``exp((cos(k_i, k_j) - 1) / bandwidth)``, divided by how many are valid.

    A key that repeats another adds 1 to it, one at a right angle next to nothing. Cosines are computed tile by tile,
    O(N^2 D) operations and O(N) memory.

    Args:
        keys: `[B, H, N, D]`, any float dtype.
        valid: bool `[B, H, N]`; other slots may hold anything.
        bandwidth: distance from cosine 1 at which a neighbour counts for 1/e; above 0.

    Returns:
        fp32 `[B, H, N]`, within [0, 1]; 0 for slots that are not valid. A key of length 0 has cosine 0 to all.

    Raises:
        ValueError: the bandwidth is not positive, or `valid` does not fit `keys`.
    """
    if not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}; give a number above 0.")
    if keys.dim() != 4 or valid.shape != keys.shape[:3]:
        raise ValueError(
            f"keys have shape {list(keys.shape)} and valid {list(valid.shape)}; give [B, H, N, D] and [B, H, N]."
        )
    count = keys.shape[2]
    unit = _directions(keys, valid).flatten(0, 1)
    counts = valid.flatten(0, 1).unsqueeze(1).float()
    density = torch.zeros(unit.shape[:2], dtype=torch.float32, device=keys.device)
    columns = unit.transpose(1, 2)
    some = max(1, _TILE // max(count * _ROWS, 1))
    for head in range(0, unit.shape[0], some):
        heads = slice(head, head + some)
        for start in range(0, count, _ROWS):
            rows = slice(start, start + _ROWS)
            near = torch.matmul(unit[heads, rows], columns[heads])
            near.sub_(1.0).mul_(1 / bandwidth).exp_()
            near.diagonal(offset=start, dim1=1, dim2=2).zero_()
            density[heads, rows] = torch.matmul(near, counts[heads].transpose(1, 2)).squeeze(-1)
    density /= counts.sum(-1).clamp(min=1)
    return density.reshape(valid.shape).masked_fill_(~valid, 0.0)


def _directions(keys: Keys, valid: Mask) -> Tensor:
    """Return keys of length 1, fp32; 0 for keys of length 0 and slots that are not valid."""
    # `where`, not a product: a slot that is not valid may hold NaN.
    plain = torch.where(valid.unsqueeze(-1), keys, 0).float()
    return plain * torch.rsqrt(torch.linalg.vecdot(plain, plain).clamp(min=_TINY)).unsqueeze(-1)
