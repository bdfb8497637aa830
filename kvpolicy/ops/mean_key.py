"""How much the keys of a head point the same way, without a keys x keys matrix (MixKV, KeyDiff)."""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from kvpolicy.ops.dispatch import dispatched
from kvpolicy.types import Keys, Mask, Scores

_TINY = 1e-30


@dispatched
def mean_key_similarity(keys: Keys, takes_part: Mask, *, unit_mean: bool = False) -> Scores:
    """Similarity of each key's direction to the mean direction, itself included.

    Args:
        keys: `[B, H, N, D]`, any float dtype.
        takes_part: bool `[B, H, N]`.
        unit_mean: False takes the product with the mean of the directions, which is the mean cosine to all keys
            (MixKV); True the cosine with it (KeyDiff).

    Returns:
        fp32 `[B, H, N]`, within [-1, 1]; 0 for slots that take no part. A zero key has no direction and gets 0.

    Raises:
        ValueError: arguments do not fit together.
    """
    unit = _unit_keys(keys, takes_part)
    mean = unit.sum(2) / takes_part.sum(-1).clamp(min=1).unsqueeze(-1)
    if unit_mean:
        mean = torch.nn.functional.normalize(mean, dim=-1)
    return torch.matmul(unit, mean.unsqueeze(-1)).squeeze(-1)


def head_redundancy(keys: Keys, takes_part: Mask) -> Float32[Tensor, "B H"]:
    """Mean cosine between two different keys of a head: MixKV's ``r = (T^2 |kbar|^2 - T) / (T (T - 1))``.

    Args:
        keys: `[B, H, N, D]`, any float dtype.
        takes_part: bool `[B, H, N]`.

    Returns:
        fp32 `[B, H]`, within [-1, 1]; 0 for heads with fewer than two keys.
    """
    unit = _unit_keys(keys, takes_part)
    count = takes_part.sum(-1)
    # The sum of the squared lengths is T, but for zero keys.
    pairs = unit.sum(2).square().sum(-1) - unit.square().sum((2, 3))
    return pairs / (count * (count - 1)).clamp(min=1)


def _unit_keys(keys: Keys, takes_part: Mask) -> Float32[Tensor, "B H N D"]:
    """Return the directions of keys `[B, H, N, D]` in fp32; 0 for zero keys and for slots that take no part."""
    # `where`, not a product: a slot that takes no part may hold NaN.
    held = torch.where(takes_part.unsqueeze(-1), keys, 0).float()
    return held * torch.rsqrt((held * held).sum(dim=-1, keepdim=True).clamp(min=_TINY))
