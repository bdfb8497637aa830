"""Turning keys that already carry a rotary embedding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvpolicy.contracts.view import Rope

_TILE = 1 << 15
"""Angles that a CPU works on at a time: what is made of them stays in a core's cache, and no page is asked for anew."""


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
    delta = delta.to(x.device)
    step = _TILE // max(len(inv_freq), 1)
    if x.device.type != "cpu" or x[..., 0].numel() <= step:
        angle = delta.float().unsqueeze(-1) * inv_freq
        return turn(x, angle.cos(), angle.sin(), interleaved=rope.interleaved)
    out, rotated = torch.empty(x.shape, dtype=x.dtype), 2 * len(inv_freq)
    vectors, to = x.reshape(-1, *x.shape[-2:]), out.view(-1, *x.shape[-2:])
    places = delta.expand(x.shape[:-1]).reshape(-1, x.shape[-2])
    some = max(1, step // places.shape[1])
    for head in range(0, len(places), some):
        for slot in range(0, places.shape[1], step):
            part = (slice(head, head + some), slice(slot, slot + step))
            angle = places[part].float().unsqueeze(-1) * inv_freq
            pair = _pair(vectors[part][..., :rotated].float(), angle.cos(), angle.sin(), interleaved=rope.interleaved)
            for target, made in zip(_halves(to[part][..., :rotated], interleaved=rope.interleaved), pair, strict=True):
                target.copy_(made)
    to[..., rotated:] = vectors[..., rotated:]
    return out


def _halves(x: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :])


def _pair(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    first, second = _halves(x, interleaved=interleaved)
    return first * cos - second * sin, second * cos + first * sin


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
    pair = [part.to(x.dtype) for part in _pair(turned, cos, sin, interleaved=interleaved)]
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
