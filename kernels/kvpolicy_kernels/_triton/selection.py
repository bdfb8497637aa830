"""Exact top-k without a sort: a search for the bits of the smallest score that stays."""

import triton
import triton.language as tl

from kvpolicy_kernels._triton.common import load_mask, row_of

LOWEST = tl.constexpr(-(2**31))
PROTECTED = tl.constexpr(2**31 - 1)
BELOW_ALL = tl.constexpr(-(2**31) + 1)


@triton.jit
def load_keys(score_row, sn, protected_row, pn, valid_row, vn, slot, n):
    """Integers in the order of the scores: protected slots above all, NaN below all, other slots never reached."""
    inside = slot < n
    valid = load_mask(valid_row, vn, slot, inside)
    protected = load_mask(protected_row, pn, slot, inside)
    score = tl.load(score_row + slot * sn, mask=valid, other=0.0)
    score = tl.where(score == 0.0, 0.0, score)  # -0 equals 0
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(score == score, key, BELOW_ALL)
    return tl.where(valid, tl.where(protected, PROTECTED, key), LOWEST)


@triton.jit(do_not_specialize=["n", "heads", "width", "sb", "sh", "pb", "ph", "vb", "vh"])
def select_top(
    score_ptr, sb, sh, sn, protected_ptr, pb, ph, pn, valid_ptr, vb, vh, vn, count_ptr, cb, ch, index_ptr,
    n, heads, width,
    BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Per row: ascending slots of the `count` largest scores, equal ones from the lowest slot on, then padding.

    `RESIDENT` holds a row of up to `BLOCK` slots in registers; longer rows are read again for each of 32 bits.
    """
    row, b, h = row_of(tl.program_id(0), heads)
    score_row = score_ptr + b * sb + h * sh
    protected_row = protected_ptr + b * pb + h * ph
    valid_row = valid_ptr + b * vb + h * vh
    count = tl.load(count_ptr + b * cb + h * ch).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    if RESIDENT:
        key = load_keys(score_row, sn, protected_row, pn, valid_row, vn, lane, n)

    # The largest threshold that at least `count` keys reach, from its highest bit to its lowest.
    threshold = tl.full([], LOWEST, tl.int32)
    bit = tl.full([], LOWEST, tl.int32)
    for _ in range(0, 32):
        trial = threshold ^ bit
        bit = (bit >> 1) & 0x7FFFFFFF
        reached = tl.zeros([], tl.int32)
        if RESIDENT:
            reached = tl.sum((key >= trial).to(tl.int32), 0)
        else:
            for start in range(0, n, BLOCK):
                some = load_keys(score_row, sn, protected_row, pn, valid_row, vn, start + lane, n)
                reached += tl.sum((some >= trial).to(tl.int32), 0)
        threshold = tl.where(reached >= count, trial, threshold)

    above = tl.zeros([], tl.int32)
    if RESIDENT:
        above = tl.sum((key > threshold).to(tl.int32), 0)
    else:
        for start in range(0, n, BLOCK):
            some = load_keys(score_row, sn, protected_row, pn, valid_row, vn, start + lane, n)
            above += tl.sum((some > threshold).to(tl.int32), 0)
    wanted = count - above  # of those that equal the threshold
    last = tl.zeros([], tl.int32)
    written = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32)
    for start in range(0, n, BLOCK):
        slot = start + lane
        some = key if RESIDENT else load_keys(score_row, sn, protected_row, pn, valid_row, vn, slot, n)
        tie = ((some == threshold) & (some > LOWEST)).to(tl.int32)
        order = tl.cumsum(tie, 0) + ties
        kept = ((some > threshold) | ((tie > 0) & (order <= wanted))).to(tl.int32)
        column = tl.cumsum(kept, 0) + written - 1
        tl.store(index_ptr + row * width + column, slot.to(tl.int64), mask=(kept > 0) & (column < width))
        last = tl.maximum(last, tl.max(tl.where(kept > 0, slot, 0), 0))
        written += tl.sum(kept, 0)
        ties += tl.sum(tie, 0)
    for start in range(0, width, BLOCK):
        column = start + lane
        padding = tl.zeros([BLOCK], tl.int64) + last
        tl.store(index_ptr + row * width + column, padding, mask=(column >= written) & (column < width))
