"""Turning keys that already carry a rotary embedding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvpolicy.view import Rope


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
    rotated = 2 * inv_freq.shape[0]
    angle = delta.to(device=x.device, dtype=torch.float32).unsqueeze(-1) * inv_freq
    cos, sin = angle.cos(), angle.sin()
    turned, rest = x[..., :rotated].float(), x[..., rotated:]
    if rope.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if rope.interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
