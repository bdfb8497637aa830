"""Redundancy of keys: how similar each one is to the others, with the newest of similar keys spared (R-KV).

The column sums of the cosine matrix have a closed form, `k_j . sum_i k_i - |k_j|^2`. Only the exempted pairs need a
search: it walks over blocks of keys from the newest backwards and drops a row as soon as it has all its exemptions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from kvpolicy.ops.attention import masked_softmax
from kvpolicy.ops.dispatch import dispatched
from kvpolicy.types import Keys, Mask, Scores

_TINY = 1e-30
_FIXED_POINT = 2.0**32
_BLOCK = 64  # columns of the first block
_PER_KEY = 256  # similarities per key that one head may hold at a time, so that memory is O(keys)
_WIDEST = 1 << 14  # columns are counted in int16
_ELEMENTS = 1 << 20  # similarities that several heads together may hold


@dispatched
def redundancy(
    keys: Keys,
    valid: Mask,
    *,
    participates: Mask | None = None,
    threshold: float = 0.5,
    beta: int = 1,
    spare: Literal["newest", "own"] = "newest",
    index_zero: bool = False,
) -> Scores:
    """Softmax of `mean_similarity` over the slots that take part.

    Args:
        keys: `[B, H, N, D]`, any float dtype.
        valid: bool `[B, H, N]`.
        participates: bool `[B, H, N]`, further restricts which slots take part; all valid ones by default.
        threshold: as in `mean_similarity`.
        beta: as in `mean_similarity`.
        spare: as in `mean_similarity`.
        index_zero: as in `mean_similarity`.

    Returns:
        fp32 `[B, H, N]`, sums to 1 over the slots that take part, 0 elsewhere; higher = more replaceable.
    """
    takes_part = valid if participates is None else valid & participates
    mean = mean_similarity(keys, takes_part, threshold=threshold, beta=beta, spare=spare, index_zero=index_zero)
    return masked_softmax(mean, takes_part)


@dispatched
def mean_similarity(
    keys: Keys,
    takes_part: Mask,
    *,
    threshold: float = 0.5,
    beta: int = 1,
    spare: Literal["newest", "own"] = "newest",
    index_zero: bool = False,
) -> Scores:
    """Mean cosine of each key to the `n` keys that take part, itself counted as 0, after the exemptions.

    Each key picks its newest `beta` similar keys (cosine above the threshold, itself never). With ``newest`` the picked
    key's mean loses the pair, so the newest of a group of twins is spared (R-KV's code); with ``own`` the mean of the
    key that picked loses it (R-KV eq. 5-6).

    Args:
        keys: `[B, H, N, D]`, any float dtype; slots in order of position.
        takes_part: bool `[B, H, N]`.
        threshold: cosine above which two keys are similar, in [0, 1].
        beta: exemptions per key, 0 for none.
        spare: ``newest`` or ``own``.
        index_zero: a key without any similar key picks the oldest key that takes part instead (a side effect of
            R-KV's code); nothing happens if `beta` is 0.

    Returns:
        fp32 `[B, H, N]`, within [-1, 1]; 0 for slots that take no part.
    """
    batch, heads, count, dim = keys.shape
    held = takes_part.reshape(batch * heads, count)
    unit = unit_keys(keys, takes_part).reshape(batch * heads, count, dim)
    sums = torch.matmul(unit, unit.sum(dim=1).unsqueeze(-1)).squeeze(-1) - (unit * unit).sum(dim=-1)
    if beta > 0 and count > 0:
        sums = sums - _exempted(unit, held, threshold, beta, spare == "newest", index_zero)
    mean = sums / held.sum(dim=-1, keepdim=True).clamp(min=1)
    return mean.masked_fill(~held, 0.0).reshape(batch, heads, count)


def unit_keys(keys: Keys, takes_part: Mask) -> Float32[Tensor, "B H N D"]:
    """Return the directions of keys `[B, H, N, D]` in fp32; 0 for zero keys and for slots that take no part."""
    # `where`, not a product: a slot that takes no part may hold NaN. Its unit vector is 0 and similar to nothing.
    held = torch.where(takes_part.unsqueeze(-1), keys, 0).float()
    return held * torch.rsqrt((held * held).sum(dim=-1, keepdim=True).clamp(min=_TINY))


class _Search(NamedTuple):
    """Some rows of `g` heads that still lack exemptions.

    Attributes:
        heads: int64 `[g]`.
        rows: int64 `[g, r]`, the keys that pick.
        quota: int64 `[g, r]`, exemptions that they lack; 0 for padding.
        high: columns from here on have been searched.
        block: columns to search next.
    """

    heads: Tensor
    rows: Tensor
    quota: Tensor
    high: int
    block: int


def _exempted(
    unit: Float32[Tensor, "M N D"],
    held: Bool[Tensor, "M N"],
    threshold: float,
    beta: int,
    spare_newest: bool,
    index_zero: bool,
) -> Float32[Tensor, "M N"]:
    """Sum of the similarities that each key's mean must lose; `M` is batch times heads."""
    total, count, _ = unit.shape
    # Integers add up to the same sum in any order, so a batch equals its rows and a GPU equals itself.
    lost = torch.zeros(total * count, dtype=torch.int64, device=unit.device)
    lonely = torch.zeros(total * count, dtype=torch.bool, device=unit.device)
    every = torch.arange(count, device=unit.device)
    step = max(1, _ELEMENTS // (count * _BLOCK))
    work = [
        _Search(heads, every.expand(heads.numel(), count), held[heads].to(torch.int64) * beta, count, _BLOCK)
        for heads in torch.split(torch.arange(total, device=unit.device), step)
    ]
    while work:
        heads, rows, quota, high, block = work.pop()
        low = max(high - block, 0)
        offset = heads.unsqueeze(-1) * count
        # Groups are contiguous in the first round, where every row looks at the newest block.
        picking = unit[heads[0] : heads[-1] + 1] if high == count else unit.reshape(total * count, -1)[offset + rows]
        cosine = torch.matmul(picking, unit[heads, low:high].transpose(-1, -2))
        _clear_own(cosine, rows - low)
        ordinal = torch.arange(1, high - low + 1, dtype=torch.int16, device=unit.device)
        similar = (cosine > threshold) * ordinal
        for _ in range(min(beta, high - low)):
            newest = similar.amax(dim=-1)
            hit = (newest > 0) & (quota > 0)
            column = (newest.to(torch.int64) - 1).clamp(min=0)
            pair = cosine.gather(-1, column.unsqueeze(-1)).squeeze(-1)
            target = offset + (column + low if spare_newest else rows)
            amount = (pair * _FIXED_POINT).masked_fill(~hit, 0.0).to(torch.int64)
            lost.scatter_add_(0, target.reshape(-1), amount.reshape(-1))
            quota = quota - hit.to(torch.int64)
            if beta > 1:
                similar.scatter_(-1, column.unsqueeze(-1), 0)
                if not bool(hit.any()):
                    break
        if low > 0:
            work.extend(_unresolved(_Search(heads, rows, quota, low, block), count))
        elif index_zero:
            found_none = (offset + rows)[quota == beta]
            lonely[found_none] = True
    result = lost.to(torch.float32).div_(_FIXED_POINT).reshape(total, count)
    return result + _oldest_instead(unit, held, lonely.reshape(total, count), spare_newest) if index_zero else result


def _clear_own(cosine: Float32[Tensor, "M R C"], column: Tensor) -> None:
    """Put the cosine of each row with itself, at `column` if inside the block, below any threshold."""
    width = cosine.shape[-1]
    inside = (column >= 0) & (column < width)
    index = column.clamp(0, width - 1).unsqueeze(-1)
    cosine.scatter_(-1, index, cosine.gather(-1, index).masked_fill(inside.unsqueeze(-1), -2.0))


def _unresolved(done: _Search, count: int) -> list[_Search]:
    """Pack the rows that still lack exemptions; heads with similar numbers of them stay together."""
    heads, rows, quota, low, block = done
    lacking = quota > 0
    numbers = lacking.sum(dim=-1).tolist()
    groups: list[list[int]] = []
    for index in sorted((i for i, number in enumerate(numbers) if number), key=lambda i: -numbers[i]):
        largest = numbers[groups[-1][0]] if groups else 0
        fits = groups and 2 * numbers[index] >= largest and (len(groups[-1]) + 1) * largest * 2 * block <= _ELEMENTS
        if fits:
            groups[-1].append(index)
        else:
            groups.append([index])
    packed = []
    for group in groups:
        members = torch.tensor(group, device=heads.device)
        width = numbers[group[0]]
        mask = lacking[members]
        rank = (mask.cumsum(dim=-1) - 1).masked_fill(~mask, width)
        blank = torch.zeros((len(group), width + 1), dtype=torch.int64, device=heads.device)
        packed_rows = blank.scatter(-1, rank, rows[members])[:, :width]
        packed_quota = blank.scatter(-1, rank, quota[members])[:, :width]
        wider = min(2 * block, max(_BLOCK, _PER_KEY * count // width), _WIDEST)
        packed.append(_Search(heads[members], packed_rows, packed_quota, low, wider))
    return packed


def _oldest_instead(
    unit: Float32[Tensor, "M N D"], held: Bool[Tensor, "M N"], lonely: Bool[Tensor, "M N"], spare_newest: bool
) -> Float32[Tensor, "M N"]:
    """Similarities lost because a key without similar keys picked the oldest one."""
    is_oldest = held & (held.cumsum(dim=-1) == 1)
    oldest = torch.where(is_oldest.unsqueeze(-1), unit, 0.0).sum(dim=1)
    pair = torch.matmul(unit, oldest.unsqueeze(-1)).squeeze(-1).masked_fill(~lonely | is_oldest, 0.0)
    return torch.where(is_oldest, pair.sum(dim=-1, keepdim=True), 0.0) if spare_newest else pair
