"""Kernel density of keys: how many others point nearly the same way."""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from kvpolicy.types import Keys, Mask, Scores

_TINY = 1e-15
_SHARPEST = 1e30  # 1 / bandwidth at most, so that products of scaled keys are finite
_ROWS = 64
# Numbers of a tile. A CPU is to keep it in a core's cache; elsewhere fewer launches count.
_TILE = {"cpu": 1 << 18}
_TILE_ELSEWHERE = 1 << 24


def key_density(
    keys: Keys, valid: Mask, *, bandwidth: float, priority: Scores | None = None, lower: float = 1.0
) -> Scores:
    """Sum over the valid keys `j != i` of ``w_ij exp((cos(k_i, k_j) - 1) / bandwidth)``, divided by how many are valid.

    A key that repeats another adds 1 to it, one at a right angle next to nothing. Cosines are computed tile by tile,
    each pair once: O(N^2 D) operations and O(N) memory. With a `priority`, `w_ij` is 1 where `j` comes before `i` and
    `lower` where it comes after it; keys are sorted first, so that a whole tile is on one side.

    Args:
        keys: `[B, H, N, D]`, any float dtype.
        valid: bool `[B, H, N]`; other slots may hold anything.
        bandwidth: distance from cosine 1 at which a neighbour counts for 1/e; above 0.
        priority: fp32 `[B, H, N]`, finite where `valid`; higher comes first, of equal ones the later slot.
        lower: weight of keys that come later, from 0 to 1; at 1 all count alike and the priority says nothing.

    Returns:
        fp32 `[B, H, N]`, within [0, 1]; 0 for slots that are not valid. A key of length 0 has cosine 0 to all.

    Raises:
        ValueError: the bandwidth is not positive, `lower` is not within [0, 1] or below 1 without a priority, or shapes
            do not fit `keys`.
    """
    if not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}; give a number above 0.")
    if keys.dim() != 4 or valid.shape != keys.shape[:3]:
        raise ValueError(
            f"keys have shape {list(keys.shape)} and valid {list(valid.shape)}; give [B, H, N, D] and [B, H, N]."
        )
    if not 0 <= lower <= 1:
        raise ValueError(f"lower is {lower}; give a number from 0 to 1.")
    if priority is not None and priority.shape != valid.shape:
        raise ValueError(f"priority has shape {list(priority.shape)}; give that of valid, {list(valid.shape)}.")
    if lower < 1:
        if priority is None:
            raise ValueError(f"lower is {lower} and there is no priority; give one, or leave lower out.")
        order = _by_priority(priority, valid)
        sorted_keys = keys.gather(2, order.unsqueeze(-1).expand_as(keys))
        found = _sorted_density(sorted_keys, valid.gather(2, order), bandwidth, lower)
        return torch.zeros_like(found).scatter_(2, order, found)
    return _sorted_density(keys, valid, bandwidth, 1.0)


def _by_priority(priority: Scores, valid: Mask) -> Int64[Tensor, "B H N"]:
    """Return slots from the first to the last; those that are not valid come at the end."""
    later_first = torch.where(valid, priority, float("-inf")).flip(-1)
    return valid.shape[-1] - 1 - later_first.sort(dim=-1, descending=True, stable=True).indices


def _sorted_density(keys: Keys, valid: Mask, bandwidth: float, lower: float) -> Scores:
    """Return the density of keys, earlier ones counted whole and later ones as `lower`."""
    sharpness = min(1 / bandwidth, _SHARPEST)
    scaled = _directions(keys, valid, sharpness**0.5).flatten(0, 1)
    counted = valid.flatten(0, 1).unsqueeze(1).float()
    density = torch.zeros(scaled.shape[:2], dtype=torch.float32, device=keys.device)
    # Within a tile on the diagonal, keys of a row above are those in columns before it.
    own = torch.ones(_ROWS, _ROWS, device=keys.device)
    own = own.tril() + lower * own.triu(1)
    for start in range(0, keys.shape[2], _ROWS):
        _add_rows(density[:, start:], scaled[:, start:], counted[:, :, start:], sharpness, lower, own)
    density /= counted.sum(-1).clamp(min=1)
    return density.reshape(valid.shape).masked_fill_(~valid, 0.0)


def _add_rows(
    density: Float32[Tensor, "M C"],
    scaled: Float32[Tensor, "M C D"],
    counted: Float32[Tensor, "M 1 C"],
    sharpness: float,
    lower: float,
    own: Float32[Tensor, "R R"],
) -> None:
    """Add to `density`, in place, all pairs that one of the first `_ROWS` keys is part of."""
    later = counted.clone()
    later[:, :, _ROWS:] *= lower
    tile = _TILE.get(scaled.device.type, _TILE_ELSEWHERE)
    some = max(1, tile // (scaled.shape[1] * _ROWS))
    for first in range(0, scaled.shape[0], some):
        heads = slice(first, first + some)
        near = torch.bmm(scaled[heads, :_ROWS], scaled[heads].transpose(1, 2))
        # Rounded cosines of twins exceed 1, which a narrow kernel would blow up.
        near.sub_(sharpness).clamp_(max=0.0).exp_()
        near.diagonal(dim1=1, dim2=2).zero_()
        if lower < 1:
            size = min(_ROWS, near.shape[2])
            near[:, :, :size] *= own[:size, :size]
        # The vector on the left: the other way round a batch of such products is slower on a CPU.
        density[heads, :_ROWS] += torch.bmm(later[heads], near.transpose(1, 2)).squeeze(1)
        density[heads, _ROWS:] += torch.bmm(counted[heads, :, :_ROWS], near[:, :, _ROWS:]).squeeze(1)


def _directions(keys: Keys, valid: Mask, length: float) -> Keys:
    """Return keys of the given length, fp32; 0 for keys of length 0 and slots that are not valid."""
    # `where`, not a product: a slot that is not valid may hold NaN.
    plain = torch.where(valid.unsqueeze(-1), keys, 0).float()
    norm = torch.linalg.vector_norm(plain, dim=-1, keepdim=True).clamp_(min=_TINY)
    return plain.mul_(length / norm)
