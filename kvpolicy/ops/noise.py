"""Random numbers without a generator: a hash of where they are used."""

from __future__ import annotations

from typing import overload

import torch
from jaxtyping import Float32, Int
from torch import Tensor

_WORD = 0xFFFFFFFF


def counter_uniform(
    seed: int,
    layer: int,
    head: Int[Tensor, "*heads"],
    position: Int[Tensor, "*dims"],
    compaction: Int[Tensor, "*rows"],
) -> Float32[Tensor, "*dims"]:
    """Uniform numbers in [0, 1) that depend on nothing but the arguments (MurmurHash3, 32 bit, one word each).

    A row therefore draws the same numbers alone and in a batch, on every device.

    Args:
        seed: not negative; 64 bits count.
        layer: index of the layer.
        head: integer tensor, index of the KV head, broadcastable to `position`.
        position: integer tensor, original positions.
        compaction: integer tensor, how many compactions the row has had, broadcastable to `position`.

    Returns:
        fp32, the broadcast shape; multiples of 2^-24.
    """
    state = _absorb(_absorb(_absorb(0, seed & _WORD), (seed >> 32) & _WORD), layer)
    counted = _absorb(torch.tensor(state, device=position.device), compaction.to(torch.int64))
    mixed = _absorb(_absorb(counted, head.to(torch.int64)), position.to(torch.int64))
    mixed = _times(mixed ^ (mixed >> 16), 0x85EBCA6B)
    mixed = _times(mixed ^ (mixed >> 13), 0xC2B2AE35)
    mixed = mixed ^ (mixed >> 16)
    return (mixed >> 8).to(torch.float32) * 2.0**-24


@overload
def _absorb(state: int, word: int) -> int: ...
@overload
def _absorb(state: Tensor, word: Tensor) -> Tensor: ...
def _absorb(state: int | Tensor, word: int | Tensor) -> int | Tensor:
    """One step of MurmurHash3 on 32-bit words held in 64-bit integers."""
    word = _times(word & _WORD, 0xCC9E2D51)
    word = _times(((word << 15) | (word >> 17)) & _WORD, 0x1B873593)
    state = state ^ word
    state = ((state << 13) | (state >> 19)) & _WORD
    return (state * 5 + 0xE6546B64) & _WORD


@overload
def _times(word: int, factor: int) -> int: ...
@overload
def _times(word: Tensor, factor: int) -> Tensor: ...
def _times(word: int | Tensor, factor: int) -> int | Tensor:
    """Product modulo 2^32, in halves so that no 64-bit product overflows."""
    low = (word & 0xFFFF) * factor
    high = ((word >> 16) * factor) & 0xFFFF
    return (low + (high << 16)) & _WORD
