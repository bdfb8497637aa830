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
_FIRST = 16  # columns of the first block: most keys find a similar one among them
_WIDER = 8  # the next block of those that did not is so many times as wide
_COPIED = 1 << 18  # numbers that are copied at a time, where copies are needed
_TILE = 1 << 17  # numbers that a step works on at most: it stays in a core's cache, and memory is O(slots)
_WIDEST = 1 << 14  # columns are counted in int16


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
    flat, held = keys.reshape(batch * heads, count, dim), takes_part.reshape(batch * heads, count)
    # Where nothing has to be left out, keys are read in place; asking would make the host wait for another device.
    masked = held.device.type != "cpu" or not bool(held.all())
    inverse, total = _directions(flat, held, masked)
    mean = _sums(flat, held, inverse, total, masked)
    if beta > 0 and count > 0:
        step = max(1, _TILE // (count * _FIRST))
        for first in range(0, batch * heads, step):
            some = slice(first, first + step)
            _exempt(mean[some], flat[some], held[some], inverse[some], threshold, beta, spare, index_zero)
    mean /= held.sum(dim=-1, keepdim=True).clamp(min=1)
    return mean.masked_fill_(~held, 0.0).reshape(batch, heads, count)


def _directions(keys: Tensor, held: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    """Return 1 / norm `[M, N]` (0 for zero keys and what takes no part), and the sum of the directions `[M, D, 1]`."""
    inverse = torch.empty(held.shape, dtype=torch.float32, device=keys.device)
    total = torch.zeros(keys.shape[0], keys.shape[2], 1, dtype=torch.float32, device=keys.device)
    for part in _parts(keys, masked):
        some = _plain(keys[:, part], held[:, part], masked)
        squares = torch.linalg.vecdot(some, some)
        inverse[:, part] = torch.rsqrt(squares.clamp(min=_TINY)).masked_fill_(squares == 0, 0.0)
        total += torch.matmul(some.transpose(1, 2), inverse[:, part].unsqueeze(-1))
    return inverse, total


def _sums(keys: Tensor, held: Tensor, inverse: Tensor, total: Tensor, masked: bool) -> Float32[Tensor, "M N"]:
    """Return each key's sum of similarities to all keys but itself, in closed form."""
    sums = torch.empty_like(inverse)
    for part in _parts(keys, masked):
        some = _plain(keys[:, part], held[:, part], masked)
        sums[:, part] = torch.matmul(some, total).squeeze(-1)
    return sums.mul_(inverse).sub_((inverse > 0).float())


def _parts(keys: Tensor, masked: bool) -> list[slice]:
    """Cut the slots so that a copy of a part of all heads stays small, if one has to be made."""
    copied = masked or keys.dtype != torch.float32
    size = max(_FIRST, _COPIED // max(keys.shape[0] * keys.shape[2], 1)) if copied else max(keys.shape[1], 1)
    return [slice(start, start + size) for start in range(0, keys.shape[1], size)]


def _plain(keys: Tensor, held: Tensor, masked: bool = True) -> Tensor:
    # `where`, not a product: a slot that takes no part may hold NaN.
    return (torch.where(held.unsqueeze(-1), keys, 0) if masked else keys).float()


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


def _exempt(
    mean: Float32[Tensor, "M N"],
    keys: Tensor,
    held: Bool[Tensor, "M N"],
    inverse: Float32[Tensor, "M N"],
    threshold: float,
    beta: int,
    spare: str,
    index_zero: bool,
) -> None:
    """Subtract from `mean`, in place, the similarities that each key's sum must lose."""
    total, count, dim = keys.shape
    # Integers add up to the same sum in any order, so a batch equals its rows and a GPU equals itself.
    lost = torch.zeros(total * count, dtype=torch.int64, device=keys.device)
    lonely = torch.zeros(total * count, dtype=torch.bool, device=keys.device)
    heads, every = torch.arange(total, device=keys.device), torch.arange(count, device=keys.device)
    step = max(_FIRST, _TILE // (total * _FIRST))
    work = []
    for first in range(0, count, step):
        rows = every[first : first + step].expand(total, -1)
        work.append(_Search(heads, rows, held[:, first : first + step].to(torch.int64) * beta, count, _FIRST))
    while work:
        heads, rows, quota, high, block = work.pop()
        low = max(high - block, 0)
        offset = heads.unsqueeze(-1) * count
        at = offset + rows
        if high == count:  # everybody's first look, in contiguous pieces
            picking = keys[:, rows[0, 0] : rows[0, -1] + 1].float()
        else:
            picking = keys.reshape(total * count, dim)[at].float()
        columns = _plain(keys[heads, low:high], held[heads, low:high]) * inverse[heads, low:high].unsqueeze(-1)
        dot = torch.matmul(picking, columns.transpose(-1, -2))
        _clear_own(dot, rows - low)
        # Norms stand on the other side of the comparison, so that no key is copied to be normalised.
        scale = inverse.reshape(-1)[at]
        similar = (dot > (threshold / scale).unsqueeze(-1)) * _ordinals(high - low, keys.device)
        for _ in range(min(beta, high - low)):
            newest = similar.amax(dim=-1)
            hit = (newest > 0) & (quota > 0)
            column = (newest.to(torch.int64) - 1).clamp(min=0)
            pair = dot.gather(-1, column.unsqueeze(-1)).squeeze(-1) * scale
            target = offset + column + low if spare == "newest" else at
            amount = (pair * _FIXED_POINT).masked_fill(~hit, 0.0).to(torch.int64)
            lost.scatter_add_(0, target.reshape(-1), amount.reshape(-1))
            quota = quota - hit.to(torch.int64)
            if beta > 1:
                similar.scatter_(-1, column.unsqueeze(-1), 0)
                if not bool(hit.any()):
                    break
        if low > 0:
            work.extend(_unresolved(_Search(heads, rows, quota, low, block)))
        elif index_zero:
            lonely[at[quota == beta]] = True
    mean -= lost.to(torch.float32).div_(_FIXED_POINT).reshape(total, count)
    if index_zero:
        mean -= _oldest_instead(keys, held, inverse, lonely.reshape(total, count), spare == "newest")


def _ordinals(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.int16, device=device)


def _clear_own(cosine: Float32[Tensor, "M R C"], column: Tensor) -> None:
    """Put the similarity of each row with itself, at `column` if inside the block, below any threshold."""
    width = cosine.shape[-1]
    inside = (column >= 0) & (column < width)
    index = column.clamp(0, width - 1).unsqueeze(-1)
    cosine.scatter_(-1, index, cosine.gather(-1, index).masked_fill(inside.unsqueeze(-1), -torch.inf))


def _unresolved(done: _Search) -> list[_Search]:
    """Pack the rows that still lack exemptions; heads with similar numbers of them stay together."""
    heads, rows, quota, low, block = done
    lacking = quota > 0
    numbers = lacking.sum(dim=-1).tolist()
    groups: list[list[int]] = []
    for index in sorted((i for i, number in enumerate(numbers) if number), key=lambda i: -numbers[i]):
        largest = numbers[groups[-1][0]] if groups else 0
        fits = groups and 2 * numbers[index] >= largest and (len(groups[-1]) + 1) * largest * block <= _TILE
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
        wider = min(_WIDER * block, max(_FIRST, _TILE // (len(group) * width)), _WIDEST)
        packed.append(_Search(heads[members], packed_rows, packed_quota, low, wider))
    return packed


def _oldest_instead(
    keys: Tensor,
    held: Bool[Tensor, "M N"],
    inverse: Float32[Tensor, "M N"],
    lonely: Bool[Tensor, "M N"],
    spare_newest: bool,
) -> Float32[Tensor, "M N"]:
    """Similarities lost because a key without similar keys picked the oldest one."""
    is_oldest = held & (held.cumsum(dim=-1) == 1)
    first = is_oldest.to(torch.int64).argmax(dim=-1)[:, None, None].expand(-1, 1, keys.shape[2])
    scale = inverse.masked_fill(~is_oldest, 0.0).sum(dim=-1)[:, None, None]
    oldest = torch.where(scale > 0, keys.gather(1, first).float() * scale, 0.0).transpose(1, 2)
    pair = torch.empty_like(inverse)
    for part in _parts(keys, True):
        pair[:, part] = torch.matmul(_plain(keys[:, part], held[:, part]), oldest).squeeze(-1) * inverse[:, part]
    pair = pair.masked_fill_(~lonely | is_oldest, 0.0)
    return torch.where(is_oldest, pair.sum(dim=-1, keepdim=True), 0.0) if spare_newest else pair
