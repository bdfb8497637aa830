"""Kernel density of keys: how many others point nearly the same way."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from kvpolicy.ops.dispatch import dispatched
from kvpolicy.ops.order import in_order
from kvpolicy.types import Keys, Mask, Scores

_TINY = 1e-15
SHARPEST = 1e30
"""1 / bandwidth at most, so that products of scaled keys are finite."""
_BROAD = 40.0  # up to here exp(1 / bandwidth) and its sums over many keys are far from the ends of fp32
_ROWS = 64
# Numbers of a tile. A CPU is to keep it in a core's cache; elsewhere fewer launches count.
_TILE = {"cpu": 1 << 18}
_TILE_ELSEWHERE = 1 << 24


@dispatched
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
        ValueError: the bandwidth is not positive, `lower` is not within [0, 1] or below 1 without a priority, or
            arguments do not fit `keys`.
    """
    order = None if lower == 1 or priority is None else by_priority(priority, valid)
    flat, held = keys.flatten(0, 1), valid.flatten(0, 1)
    if order is not None:
        held = held.gather(1, order)
    sharpness = min(1 / bandwidth, SHARPEST)
    density = _sums(_directions(flat, held, order, sharpness**0.5), held, sharpness, lower)
    density = (density / held.sum(-1, keepdim=True).clamp_(min=1)).masked_fill_(~held, 0.0)
    if order is not None:
        density = torch.empty_like(density).scatter_(1, order, density)
    return density.reshape(valid.shape)


def by_priority(priority: Scores, valid: Mask) -> Int64[Tensor, "M N"]:
    """Return the slots of each head from the first to the last; those that are not valid come at the end."""
    rising = torch.where(valid, priority, float("-inf")).flatten(0, 1)
    return in_order(rising)[1].flip(-1)  # of equal ones the later slot comes first


def _directions(keys: Tensor, held: Tensor, order: Tensor | None, length: float) -> Float32[Tensor, "M D N"]:
    """Return keys of the given length in an order; 0 for keys of length 0 and slots that are not held."""
    # Columns: a product with a wide matrix on the right is faster if that lies row by row.
    made = torch.empty(keys.shape[0], keys.shape[2], keys.shape[1], dtype=torch.float32, device=keys.device)
    # Where nothing has to be left out no copy is made; asking would make the host wait for another device.
    masked = held.device.type != "cpu" or not bool(held.all())
    some = max(1, _tile(keys) // max(keys[0].numel(), 1)) if len(keys) else 1
    for first in range(0, len(keys), some):
        part = slice(first, first + some)
        plain = keys[part].float()
        if order is not None:
            count = plain.shape[1]
            at = order[part] + torch.arange(0, len(plain) * count, count, device=keys.device).unsqueeze(-1)
            plain = plain.reshape(-1, plain.shape[2]).index_select(0, at.flatten()).view(plain.shape)
        if masked:  # `where`, not a product: a slot that is not valid may hold NaN
            plain = torch.where(held[part].unsqueeze(-1), plain, 0)
        norm = torch.linalg.vector_norm(plain, dim=-1, keepdim=True).clamp_(min=_TINY)
        torch.mul(plain.transpose(1, 2), (length / norm).transpose(1, 2), out=made[part])
    return made


def _sums(scaled: Float32[Tensor, "M D N"], held: Tensor, sharpness: float, lower: float) -> Float32[Tensor, "M N"]:
    """Sum the kernel over all pairs, tile by tile: earlier keys whole and later ones as `lower`."""
    total, _, count = scaled.shape
    counted = held.unsqueeze(1).float()
    density = torch.zeros_like(counted)
    # Within a tile on the diagonal, keys of a row above are those in columns before it; none counts itself.
    own = torch.ones(_ROWS, _ROWS, device=scaled.device)
    own = own.tril(-1) + lower * own.triu(1)
    tile = _tile(scaled)
    room = torch.empty(max(min(tile, total * _ROWS * count), _ROWS * count), device=scaled.device)
    narrow = sharpness > _BROAD
    for start in range(0, count, _ROWS):
        stop = min(start + _ROWS, count)
        height, width = stop - start, count - start
        weights = torch.cat([counted[:, :, start:stop], lower * counted[:, :, stop:]], dim=2)
        some = max(1, tile // (width * _ROWS))
        for first in range(0, total, some):
            heads = slice(first, first + some)
            left, right = scaled[heads, :, start:stop].transpose(1, 2), scaled[heads, :, start:]
            near = torch.bmm(left, right, out=room[: left.shape[0] * height * width].view(-1, height, width))
            if narrow:
                # Rounded cosines of twins exceed 1, which a narrow kernel would blow up.
                near.sub_(sharpness).clamp_(max=0.0)
            near.exp_()
            near[:, :, :height].mul_(own[:height, :height])
            # The vector on the left: the other way round a batch of such products is slower on a CPU.
            density[heads, :, start:stop].add_(torch.bmm(weights[heads], near.transpose(1, 2)))
            density[heads, :, stop:].add_(torch.bmm(counted[heads, :, start:stop], near[:, :, height:]))
    # The constant factor of a broad kernel can be taken out of the sums, which saves two passes over all pairs.
    return (density if narrow else density.mul_(math.exp(-sharpness))).squeeze(1)


def _tile(tensor: Tensor) -> int:
    return _TILE.get(tensor.device.type, _TILE_ELSEWHERE)
