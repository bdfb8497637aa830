"""Kernel density of keys in Triton; the definition is `kvpolicy.ops.density`."""

from __future__ import annotations

import torch

from kvpolicy.ops import arguments
from kvpolicy.ops.density import SHARPEST, by_priority
from kvpolicy.types import Keys, Mask, Scores
from kvpolicy_kernels import served
from kvpolicy_kernels.launching import as_bytes, launch, upcast

TILE = 64
WIDTH = 16
"""Numbers of a key that are multiplied at a time: more of them in fp32 would spill registers."""


def key_density(
    keys: Keys, valid: Mask, *, bandwidth: float, priority: Scores | None = None, lower: float = 1.0
) -> Scores:
    """As `kvpolicy.ops.key_density`; where keys are in order, that of the priorities is found by torch.

    Raises:
        UnsupportedError: a layout has no kernel.
        ValueError: arguments do not fit together.
    """
    arguments.key_density(keys, valid, bandwidth=bandwidth, priority=priority, lower=lower)
    served.require(served.key_density(keys, valid))
    batch, heads, n, dim = keys.shape
    out = torch.empty(batch, heads, n, dtype=torch.float32, device=keys.device)
    order = None if lower == 1 or priority is None else by_priority(priority, valid).contiguous()
    width = min(WIDTH, dim & -dim)
    launch(
        "density.sum_near", batch * heads * -(-n // TILE),
        keys, *keys.stride()[:3], as_bytes(valid), *valid.stride(), order, out,
        float(min(1 / bandwidth, SHARPEST)), float(lower), n, heads,
        D=width, PARTS=dim // width, TILE=TILE, ORDERED=order is not None, UPCAST=upcast(),
    )  # fmt: skip
    return out
