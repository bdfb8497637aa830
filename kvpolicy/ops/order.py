"""Sorting scores, stably and fast."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

_NUMPY = find_spec("numpy") is not None


def in_order(
    scores: Float32[Tensor, "*rows N"], *, descending: bool = False
) -> tuple[Float32[Tensor, "*rows N"], Int64[Tensor, "*rows N"]]:
    """Sort the last dimension of fp32 numbers without NaN; equal ones keep the lower slot first.

    Returns:
        The sorted numbers and the slots that they come from, int64.
    """
    if scores.device.type != "cpu" or not _NUMPY:
        return scores.sort(dim=-1, descending=descending, stable=True)
    # torch sorts rows on a CPU by comparisons, pairs of number and slot. One integer that holds both, the bits of the
    # number above the slot, can be sorted by numpy's vector instructions: a tenth of the time, and the same order.
    bits = (scores.detach() + 0.0).view(torch.int32)  # -0 + 0 is 0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = ((~rising if descending else rising).long() << 32) | torch.arange(scores.shape[-1])
    whole = key.numpy()
    whole.sort(axis=-1)
    slots = key & 0xFFFFFFFF
    return scores.gather(-1, slots), slots
