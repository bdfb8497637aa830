"""Redundancy of keys: how similar each one is to the others, with the newest of similar keys spared (R-KV).

The column sums of the cosine matrix have a closed form, `k_j . sum_i k_i - |k_j|^2`. Only the exempted pairs need a
search: it walks over blocks of keys from the newest backwards and drops a row as soon as it has all its exemptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float32
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvpolicy.ops.attention import masked_softmax
from kvpolicy.ops.dispatch import dispatched
from kvpolicy.types import Keys, Mask, Scores

_FIXED_POINT = 2.0**32
_FIRST = 16  # columns of the first block: most keys find a similar one among them
_WIDER = 8  # the next block of those that did not is so many times as wide
_COPIED = 1 << 18  # numbers that are copied at a time, where copies are needed
_TILE = 1 << 18  # numbers that a step works on at most: it stays in a core's cache, and memory is O(slots)
_WIDEST = 1 << 14  # columns are counted in int16
_KEY = 64  # numbers of a key, about: columns are copied too
_PADDING = 1 << 16  # products that may be computed for nothing to save one more step


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
            _exempt(mean[some], flat[some], held[some], inverse[some], masked, threshold, beta, spare, index_zero)
    mean /= held.sum(dim=-1, keepdim=True).clamp_(min=1)
    return (mean.masked_fill_(~held, 0.0) if masked else mean).reshape(batch, heads, count)


def _directions(keys: Tensor, held: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    """Return 1 / norm `[M, N]` (0 for zero keys and what takes no part), and the sum of the directions `[M, 1, D]`."""
    inverse = torch.empty(held.shape, dtype=torch.float32, device=keys.device)
    total = torch.zeros(keys.shape[0], 1, keys.shape[2], dtype=torch.float32, device=keys.device)
    for part in _parts(keys, masked):
        some = _plain(keys[:, part], held[:, part], masked)
        norm = torch.linalg.vector_norm(some, dim=-1)
        inverse[:, part] = norm.reciprocal().masked_fill_(norm == 0, 0.0)
        # The vector on the left: the other way round a batch of such products is ten times slower on a CPU.
        total += torch.matmul(inverse[:, None, part], some)
    return inverse, total


def _sums(keys: Tensor, held: Tensor, inverse: Tensor, total: Tensor, masked: bool) -> Float32[Tensor, "M N"]:
    """Return each key's sum of similarities to all keys but itself, in closed form."""
    sums = torch.empty_like(inverse)
    for part in _parts(keys, masked):
        some = _plain(keys[:, part], held[:, part], masked)
        sums[:, part] = torch.matmul(total, some.transpose(1, 2)).squeeze(1)
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
        heads: the `g` heads.
        rows: int64 `[g, r]`, the keys that pick.
        quota: int64 `[g, r]`, exemptions that they lack; 0 for padding.
        first: the first row where rows lie side by side and are the same in all heads, or None.
        high: columns from here on have been searched.
        block: columns to search next.
    """

    heads: Sequence[int]
    rows: Tensor
    quota: Tensor
    first: int | None
    high: int
    block: int

    @property
    def low(self) -> int:
        """The first column to search next."""
        return max(self.high - self.block, 0)


def _exempt(
    mean: Float32[Tensor, "M N"],
    keys: Tensor,
    held: Bool[Tensor, "M N"],
    inverse: Float32[Tensor, "M N"],
    masked: bool,
    threshold: float,
    beta: int,
    spare: str,
    index_zero: bool,
) -> None:
    """Subtract from `mean`, in place, the similarities that each key's sum must lose."""
    total, count, _ = keys.shape
    # Integers add up to the same sum in any order, so a batch equals its rows and a GPU equals itself.
    lost = torch.zeros(total * count, dtype=torch.int64, device=keys.device)
    lonely = torch.zeros(total * count, dtype=torch.bool, device=keys.device)
    every = torch.arange(count, device=keys.device)
    ordinals = torch.arange(1, min(count, _WIDEST) + 1, dtype=torch.int16, device=keys.device)
    starts = torch.arange(0, total * count, count, device=keys.device).unsqueeze(-1)
    step = max(_FIRST, _TILE // (total * _FIRST))
    work = []
    for first in range(0, count, step):
        rows = every[first : first + step].expand(total, -1)
        work.append(_Search(range(total), rows, held[:, first : first + step].long() * beta, first, count, _FIRST))
    while work:
        search = work.pop()
        rows, quota, low = search.rows, search.quota, search.low
        offset = starts if search.first is not None else _joined([starts[head] for head in search.heads])
        at = offset + rows
        # The longer side is the inner one: what is done along it is done in one go.
        if search.first is not None:
            axis, number = 1, ordinals[: search.high - low].unsqueeze(-1)
            dot, scale = _dots_of_all(keys, held, inverse, masked, search)
            # Norms stand on the other side of the comparison, so that no key is copied to be normalised.
            similar = dot > (threshold / scale).unsqueeze(1)
        else:
            axis, number = 2, ordinals[: search.high - low]
            dot, scale = _cosines(keys, held, inverse, masked, search), None
            similar = dot > threshold
        similar = similar.to(torch.int16).mul_(number)
        for _ in range(min(beta, search.high - low)):
            newest = similar.amax(dim=axis)
            hit = (newest > 0) & (quota > 0)
            column = newest.long().sub_(1).clamp_(min=0)
            pair = dot.gather(axis, column.unsqueeze(axis)).squeeze(axis)
            pair = pair if scale is None else pair * scale
            target = offset + low + column if spare == "newest" else at
            amount = (pair * _FIXED_POINT).masked_fill_(~hit, 0.0).long()
            lost.scatter_add_(0, target.reshape(-1), amount.reshape(-1))
            quota = quota - hit.long()
            if beta > 1:
                similar.scatter_(axis, column.unsqueeze(axis), 0)
                if not bool(hit.any()):
                    break
        if low > 0:
            work.extend(_unresolved(search, quota))
        elif index_zero:
            lonely[at[quota == beta]] = True
    if index_zero:
        _exempt_oldest(lost, keys, held, inverse, lonely.reshape(total, count), spare == "newest")
    mean -= lost.to(torch.float32).div_(_FIXED_POINT).reshape(total, count)


def _dots_of_all(
    keys: Tensor, held: Tensor, inverse: Tensor, masked: bool, search: _Search
) -> tuple[Float32[Tensor, "g C r"], Float32[Tensor, "g r"]]:
    """Return products of the directions of the columns with keys that lie side by side, and 1 / norm of the latter.

    The product of a key with itself is below any threshold.
    """
    first, high, low = search.first or 0, search.high, search.low
    stop = first + search.rows.shape[1]
    columns = _plain(keys[:, low:high], held[:, low:high], masked) * inverse[:, low:high].unsqueeze(-1)
    dot = torch.matmul(columns, keys[:, first:stop].float().transpose(1, 2))
    start, end = max(low, first), min(high, stop)
    if start < end:
        own = dot[:, start - low : end - low, start - first : end - first]
        own.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return dot, inverse[:, first:stop]


def _cosines(keys: Tensor, held: Tensor, inverse: Tensor, masked: bool, search: _Search) -> Float32[Tensor, "g r C"]:
    """Return cosines of keys from here and there with the columns; that of a key with itself is below any threshold."""
    among, count = slice(search.low, search.high), search.high - search.low
    each = [(keys[h], inverse[h], held[h, among], some) for h, some in zip(search.heads, search.rows, strict=True)]
    picking = _joined(
        [k.index_select(0, some).float() * i.index_select(0, some).unsqueeze(-1) for k, i, _, some in each]
    )
    columns = _joined([_plain(k[among], mask, masked) for k, _, mask, _ in each])
    dot = torch.matmul(picking, columns.transpose(1, 2)).mul_(_joined([i[None, among] for _, i, _, _ in each]))
    column = search.rows - search.low
    inside = (column >= 0) & (column < count)
    index = column.clamp_(0, count - 1).unsqueeze(2)
    return dot.scatter_(2, index, dot.gather(2, index).masked_fill_(inside.unsqueeze(2), -torch.inf))


def _unresolved(done: _Search, quota: Tensor) -> list[_Search]:
    """Pack the rows that still lack exemptions, by the new `quota`; heads with similar numbers of them together."""
    lacking = [mask.nonzero().squeeze(-1) for mask in (quota > 0).unbind()]
    numbers = [index.numel() for index in lacking]
    block = _WIDER * done.block
    groups: list[list[int]] = []
    for index in sorted((i for i, number in enumerate(numbers) if number), key=lambda i: -numbers[i]):
        largest = numbers[groups[-1][0]] if groups else 0
        padding = (largest - numbers[index]) * block
        if groups and padding <= _PADDING and (len(groups[-1]) + 1) * largest * block <= _TILE:
            groups[-1].append(index)
        else:
            groups.append([index])
    packed = []
    for group in groups:
        rows = _padded([done.rows[i].index_select(0, lacking[i]) for i in group])
        left = _padded([quota[i].index_select(0, lacking[i]) for i in group])
        wider = min(block, max(_FIRST, _TILE // max(rows.numel(), len(group) * _KEY)), _WIDEST)
        packed.append(_Search([done.heads[i] for i in group], rows, left, None, done.low, wider))
    return packed


def _joined(parts: list[Tensor]) -> Tensor:
    """Stack tensors; a single one is not copied."""
    return torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)


def _padded(parts: list[Tensor]) -> Tensor:
    """Stack vectors, the shorter ones padded with 0; a single one is not copied."""
    return pad_sequence(parts, batch_first=True) if len(parts) > 1 else parts[0].unsqueeze(0)


def _exempt_oldest(
    lost: Tensor,
    keys: Tensor,
    held: Bool[Tensor, "M N"],
    inverse: Float32[Tensor, "M N"],
    lonely: Bool[Tensor, "M N"],
    spare_newest: bool,
) -> None:
    """Add to `lost` the similarities of keys without similar ones to the oldest key, which they pick instead."""
    found = lonely.nonzero()
    if found.shape[0] == 0:
        return
    first = held.to(torch.uint8).argmax(dim=-1)
    for some in found.split(max(1, _TILE // keys.shape[2])):
        head, row = some.unbind(1)
        oldest = first[head]
        one, other = keys[head, oldest].float(), keys[head, row].float()
        pair = torch.linalg.vecdot(one, other) * inverse[head, oldest] * inverse[head, row]
        amount = (pair * _FIXED_POINT).masked_fill_(row == oldest, 0.0).long()
        lost.scatter_add_(0, head * keys.shape[1] + (oldest if spare_newest else row), amount)
