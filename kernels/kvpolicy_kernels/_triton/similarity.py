"""Redundancy: closed-form column sums, and the backward search for the similar keys that are exempted."""

import triton
import triton.language as tl

from kvpolicy_kernels._triton.common import NEVER, dot, load_mask, row_of, tile_of

FIXED_POINT = tl.constexpr(4294967296.0)


@triton.jit(do_not_specialize=["tiles"])
def fold_sums(
    partial_ptr, first_ptr, held_ptr, total_ptr, oldest_ptr, number_ptr, tiles,
    D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per row: the sum of all unit keys, the oldest key that takes part and how many do, in a fixed order."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, D)
    for part in tl.static_range(PARTS):
        total = tl.zeros([D], tl.float32)
        for start in range(0, tiles, BLOCK):
            at = start + tl.arange(0, BLOCK)
            spot = (row * tiles + at[:, None]) * D * PARTS + part * D + dim[None, :]
            total += tl.sum(tl.load(partial_ptr + spot, mask=(at < tiles)[:, None], other=0.0), 0)
        tl.store(total_ptr + row * D * PARTS + part * D + dim, total)
    oldest = tl.full([], NEVER, tl.int32)
    number = tl.zeros([], tl.int32)
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        here = at < tiles
        oldest = tl.minimum(oldest, tl.min(tl.load(first_ptr + row * tiles + at, mask=here, other=NEVER), 0))
        number += tl.sum(tl.load(held_ptr + row * tiles + at, mask=here, other=0), 0)
    tl.store(oldest_ptr + row, oldest)
    tl.store(number_ptr + row, number)


@triton.jit
def column_sum(unit, total, ITSELF: tl.constexpr):
    """Products of unit keys, or parts of them, with the sum of all, without or with that of each key with itself."""
    return tl.sum(unit * total[None, :], 1) if ITSELF else tl.sum(unit * total[None, :], 1) - tl.sum(unit * unit, 1)


@triton.jit(do_not_specialize=["n", "heads", "threshold"])
def exempt(
    k_ptr, kb, kh, kn, inverse_ptr, total_ptr, oldest_ptr, base_ptr, lost_ptr,
    threshold, n, heads,
    D: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BETA: tl.constexpr, OWN: tl.constexpr,
    INDEX_ZERO: tl.constexpr, ITSELF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Per tile of keys that pick: their column sums, with `ITSELF` on the diagonal too, and what those picked lose.

    The scan walks from the newest tile backwards and stops when every key of the tile has its `BETA` picks. Losses are
    added as integers, whose sum does not depend on the order; with `OWN` they stay with the key that picks.
    """
    row, b, h, tile, tiles, column = tile_of(n, heads, TILE)
    dim = tl.arange(0, D)
    inside = column < n
    k_row = k_ptr + b * kb + h * kh
    inverse = tl.load(inverse_ptr + row * n + column, mask=inside, other=0.0)
    # A key that takes no part has 0 here. A NaN key has not, so that its row's scores are NaN and refused.
    held = inverse != 0.0
    k_at = k_row + column[:, None] * kn + dim[None, :]
    k = tl.load(k_at, mask=held[:, None], other=0.0)
    unit = k.to(tl.float32) * inverse[:, None]
    total_at = total_ptr + row * D * PARTS + dim
    base = column_sum(unit, tl.load(total_at), ITSELF)
    for part in range(1, PARTS):  # not unrolled: the parts of a wide key together would spill registers
        unit = tl.load(k_at + part * D, mask=held[:, None], other=0.0).to(tl.float32) * inverse[:, None]
        base += column_sum(unit, tl.load(total_at + part * D), ITSELF)

    if BETA > 0:
        quota = tl.where(held, BETA, 0)
        own = tl.zeros([TILE], tl.float32)
        ordinal = tl.arange(0, TILE)
        other = tiles - 1
        lacking = tl.sum(quota, 0)
        while (other >= 0) & (lacking > 0):
            them = other * TILE + ordinal
            their = tl.load(inverse_ptr + row * n + them, mask=them < n, other=0.0)
            there = (their != 0.0)[:, None]
            their_at = k_row + them[:, None] * kn + dim[None, :]
            cosine = dot(k, tl.trans(tl.load(their_at, mask=there, other=0.0)), UPCAST)
            if PARTS > 1:
                for piece in range(1, PARTS):  # read again and not unrolled: wide keys would spill registers
                    mine = tl.load(k_at + piece * D, mask=held[:, None], other=0.0)
                    cosine += dot(mine, tl.trans(tl.load(their_at + piece * D, mask=there, other=0.0)), UPCAST)
            cosine = cosine * inverse[:, None] * their[None, :]
            similar = (cosine > threshold) & (column[:, None] != them[None, :])
            left = tl.where(similar, ordinal[None, :] + 1, 0)
            for _ in tl.static_range(BETA):
                newest = tl.max(left, 1)
                hit = (newest > 0) & (quota > 0)
                picked = left == newest[:, None]
                pair = tl.sum(tl.where(picked, cosine, 0.0), 1)
                if OWN:
                    own += tl.where(hit, pair, 0.0)
                else:
                    amount = (tl.where(hit, pair, 0.0) * FIXED_POINT).to(tl.int64)
                    target = other * TILE + tl.maximum(newest, 1) - 1
                    tl.atomic_add(lost_ptr + row * n + target, amount, mask=hit, sem="relaxed")
                left = tl.where(picked, 0, left)
                quota -= hit.to(tl.int32)
            lacking = tl.sum(quota, 0)
            other -= 1

        if INDEX_ZERO:
            # A key that found none picks the oldest key instead, unless it is that key.
            oldest = tl.minimum(tl.load(oldest_ptr + row), n - 1)
            lonely = held & (quota == BETA) & (column != oldest)
            pair = tl.zeros([TILE], tl.float32)
            for part in tl.static_range(PARTS):
                first = tl.load(k_row + oldest * kn + part * D + dim).to(tl.float32)
                # Read again, rather than to hold the tile in registers during the scan.
                again = tl.load(k_at + part * D, mask=lonely[:, None], other=0.0)
                pair += tl.sum(again.to(tl.float32) * first[None, :], 1)
            pair *= inverse * tl.load(inverse_ptr + row * n + oldest)
            pair = tl.where(lonely, pair, 0.0)
            if OWN:
                own += pair
            else:
                # A pair with a NaN key counts nothing; that row's scores are NaN already.
                amount = tl.sum((tl.where(pair == pair, pair, 0.0) * FIXED_POINT).to(tl.int64), 0)
                tl.atomic_add(lost_ptr + row * n + oldest, amount, sem="relaxed")
        base -= own
    tl.store(base_ptr + row * n + column, base, mask=inside)


@triton.jit
def column_mean(base_ptr, lost_ptr, row, column, n, number, LOST: tl.constexpr):
    """Mean similarity of some columns."""
    inside = column < n
    value = tl.load(base_ptr + row * n + column, mask=inside, other=0.0)
    if LOST:
        lost = tl.load(lost_ptr + row * n + column, mask=inside, other=0)
        value -= lost.to(tl.float32) / FIXED_POINT
    return value / tl.maximum(number, 1).to(tl.float32)


@triton.jit(do_not_specialize=["n", "heads", "vb", "vh"])
def finish_redundancy(
    base_ptr, lost_ptr, valid_ptr, vb, vh, vn, number_ptr, out_ptr, n, heads,
    BLOCK: tl.constexpr, LOST: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Per row: means, or their softmax over the keys that take part; 0 elsewhere."""
    row, b, h = row_of(tl.program_id(0), heads)
    mask_row = valid_ptr + b * vb + h * vh
    number = tl.load(number_ptr + row)
    total = tl.zeros([BLOCK], tl.float32)
    if SOFTMAX:
        for start in range(0, n, BLOCK):
            column = start + tl.arange(0, BLOCK)
            held = load_mask(mask_row, vn, column, column < n)
            mean = column_mean(base_ptr, lost_ptr, row, column, n, number, LOST)
            # Means lie within [-1, 1]: no maximum has to be taken off.
            total += tl.where(held, tl.exp(mean), 0.0)
    share = 1.0 / tl.maximum(tl.sum(total, 0), 1e-30) if SOFTMAX else 1.0
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        held = load_mask(mask_row, vn, column, column < n)
        mean = column_mean(base_ptr, lost_ptr, row, column, n, number, LOST)
        value = tl.exp(mean) * share if SOFTMAX else mean
        tl.store(out_ptr + row * n + column, tl.where(held, value, 0.0), mask=column < n)
