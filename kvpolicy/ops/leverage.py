"""Leverage: how badly an entry's key is described by all the others."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from kvpolicy.ops.noise import counter_uniform
from kvpolicy.types import Keys, Mask, Scores

_RIDGE = 1e-7  # of the trace: what SmolLM2's keys vary by in their poorest direction is ten times as much
_TINY = 1e-30


def leverage(keys: Keys, takes_part: Mask, projection: Float[Tensor, "D S"] | None = None) -> Scores:
    """Statistical leverage `x (X'X + ridge)^-1 x'` of each key, where `X` are the centred keys, projected if asked.

    Args:
        keys: `[B, H, N, D]`, any float dtype.
        takes_part: bool `[B, H, N]`; the others may hold anything.
        projection: `[D, S]`, the right sketch; None for the exact leverage.

    Returns:
        fp32 `[B, H, N]` within [0, 1], their sum at most `D` (or `S`); 0 for slots that take no part. The ridge is
        1e-7 of the trace of `X'X`, so that fewer keys than dimensions, or equal ones, are no error.
    """
    held = takes_part.unsqueeze(-1)
    x = torch.where(held, keys, 0).float()
    mean = x.sum(dim=2, keepdim=True) / held.sum(dim=2, keepdim=True).clamp(min=1)
    x = torch.where(held, x - mean, 0.0)
    # To unit size first: squares of keys would leave the range of fp32 before their ratios do.
    x = x / x.abs().amax(dim=(2, 3), keepdim=True).clamp(min=_TINY)
    x = (x if projection is None else torch.matmul(x, projection.to(x))).double()
    gram = torch.matmul(x.transpose(-1, -2), x)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # Unlike `cholesky` it does not wait for the device to say that the matrix is definite, which the ridge ensures.
    lower, _ = torch.linalg.cholesky_ex(gram + unit * (_RIDGE * trace + _TINY)[..., None, None])
    white: Tensor = torch.linalg.solve_triangular(lower, x.transpose(-1, -2), upper=False)
    scores: Tensor = white.square().sum(dim=-2).clamp(max=1.0).float()
    return scores


def gaussian_sketch(dim: int, size: int, seed: int, device: torch.device) -> Float32[Tensor, "D S"]:
    """Independent normal numbers of variance `1 / size`, `[dim, size]`, the same ones for the same seed everywhere."""
    cell = torch.arange(dim * size, device=device)
    zero = torch.zeros_like(cell)
    radius = torch.sqrt(-2 * torch.log1p(-counter_uniform(seed, 0, zero, cell, zero)))
    angle = 2 * torch.pi * counter_uniform(seed, 1, zero, cell, zero)
    return (radius * torch.cos(angle)).reshape(dim, size) / math.sqrt(size)
