"""Turning keys that already carry a rotary embedding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvpolicy.contracts.view import Rope


def rotate(x: Float[Tensor, "*dims N D"], rope: Rope, delta: Int[Tensor, "*dims N"]) -> Float[Tensor, "*dims N D"]:
    """Turn each vector by `delta` positions; `rotate(key, rope, -position)` takes the embedding off.

    Only the first `R = 2 * len(rope.inv_freq)` dimensions turn (partial rotary embeddings).

    Args:
        x: `[..., N, D]`, any float dtype.
        rope: inverse frequencies, radians per position, and the layout.
        delta: integers `[..., N]`, broadcastable to `x` without its last axis.

    Returns:
        `[..., N, D]` in the dtype of `x`; computed in fp32.
    """
    inv_freq = rope.inv_freq.to(device=x.device, dtype=torch.float32)
    angle = delta.to(device=x.device, dtype=torch.float32).unsqueeze(-1) * inv_freq
    return turn(x, angle.cos(), angle.sin(), interleaved=rope.interleaved)


def turn(x: Float[Tensor, "*dims D"], cos: Tensor, sin: Tensor, *, interleaved: bool) -> Float[Tensor, "*dims D"]:
    """Multiply each pair of dimensions, as a complex number, by `cos + i sin`; of any length, so averages too.

    Args:
        x: `[..., D]`, any float dtype; dimensions from `R` on stay.
        cos: fp32 `[..., R/2]`, broadcastable to `x` without its last axis.
        sin: fp32, shaped as `cos`.
        interleaved: as in `Rope`.

    Returns:
        `[..., D]` in the dtype of `x`; computed in fp32.
    """
    rotated = 2 * cos.shape[-1]
    turned, rest = x[..., :rotated].float(), x[..., rotated:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    pair = [(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)]
    whole = [torch.stack(pair, dim=-1).flatten(-2)] if interleaved else pair
    if rest.shape[-1]:
        whole.append(rest.expand(*whole[0].shape[:-1], rest.shape[-1]))
    return torch.cat(whole, dim=-1) if len(whole) > 1 else whole[0]


def mean_rotation(
    rope: Rope, positions: Int[Tensor, "*rows P"]
) -> tuple[Float[Tensor, "*rows half"], Float[Tensor, "*rows half"]]:
    """Average the rotations to several positions; `(cos, sin)` for `turn`, fp32 `[..., R/2]` each."""
    angle = positions.to(torch.float32).unsqueeze(-1) * rope.inv_freq.to(device=positions.device, dtype=torch.float32)
    return angle.cos().mean(dim=-2), angle.sin().mean(dim=-2)
