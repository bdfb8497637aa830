"""Decode attention over a ragged base and a dense tail: split-K, then a combination of the parts."""

import triton
import triton.language as tl

from kvpolicy_kernels._triton.common import capped, dot, load_mask, row_of


@triton.jit
def step(
    q, keys, values, seen, most, total, sums, scale, cap, CAPPED: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Add a tile of slots to the running maximum, sum and weighted values of some queries."""
    logit = dot(q, tl.trans(keys), UPCAST) * scale
    if CAPPED:
        logit = capped(logit, cap)
    logit = tl.where(seen, logit, float("-inf"))
    larger = tl.maximum(most, tl.max(logit, 1))
    shift = tl.where(larger == float("-inf"), 0.0, larger)
    weight = tl.exp(logit - shift[:, None])
    old = tl.exp(most - shift)
    total = total * old + tl.sum(weight, 1)
    if not UPCAST:
        weight = weight.to(values.dtype)
    return larger, total, sums * old[:, None] + dot(weight, values, UPCAST)


@triton.jit(do_not_specialize=["heads", "group", "count", "splits", "tail", "block_slots", "scale", "cap"])
def attend_part(
    q_ptr, qb, qh, qq, base_k_ptr, base_v_ptr, start_ptr, filled_ptr,
    tail_k_ptr, tkb, tkh, tkn, tail_v_ptr, tvb, tvh, tvn, seen_ptr, sb, sh, sq, sn,
    part_ptr, most_ptr, total_ptr,
    scale, cap, heads, group, count, splits, tail, block_slots,
    D: tl.constexpr, HELD: tl.constexpr, DV: tl.constexpr, HELD_V: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One part of one KV head for `ROWS` of its `group * count` queries; the last part is the tail.

    Keys have `D` numbers and values `DV`, which lie in tiles that are `HELD` and `HELD_V` wide, powers of two.
    """
    parts = splits + 1
    tiles = tl.cdiv(group * count, ROWS)
    pid = tl.program_id(0)
    part = pid % parts
    tile = (pid // parts) % tiles
    owner, b, h = row_of(pid // parts // tiles, heads)
    line = tile * ROWS + tl.arange(0, ROWS)
    here = line < group * count
    dim = tl.arange(0, HELD)
    out_dim = tl.arange(0, HELD_V)
    asked = line % count
    q_at = b * qb + (h * group + line // count) * qh + asked * qq
    q = tl.load(q_ptr + q_at[:, None] + dim[None, :], mask=here[:, None] & (dim < D)[None, :], other=0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, HELD_V], tl.float32)
    lane = tl.arange(0, TILE)

    if part < splits:
        # The blocks of a head follow each other and only its last one may have free slots: one run of entries.
        first = tl.load(start_ptr + owner)
        behind = tl.load(start_ptr + owner + 1)
        filled = tl.load(filled_ptr + tl.maximum(behind - 1, 0))
        entries = tl.where(behind > first, (behind - first - 1) * block_slots + filled, 0).to(tl.int32)
        each = tl.cdiv(tl.cdiv(entries, splits), TILE) * TILE
        stop = tl.minimum(entries, (part + 1) * each)
        keys_at = base_k_ptr + first * block_slots * D
        values_at = base_v_ptr + first * block_slots * DV
        for begin in range(part * each, stop, TILE):
            slot = begin + lane
            inside = slot < stop
            k_at = keys_at + slot[:, None] * D + dim[None, :]
            keys = tl.load(k_at, mask=inside[:, None] & (dim < D)[None, :], other=0.0)
            v_at = values_at + slot[:, None] * DV + out_dim[None, :]
            values = tl.load(v_at, mask=inside[:, None] & (out_dim < DV)[None, :], other=0.0)
            seen = here[:, None] & inside[None, :]
            most, total, sums = step(q, keys, values, seen, most, total, sums, scale, cap, CAPPED, UPCAST)
    else:
        for begin in range(0, tail, TILE):
            slot = begin + lane
            inside = slot < tail
            k_at = tail_k_ptr + b * tkb + h * tkh + slot[:, None] * tkn + dim[None, :]
            keys = tl.load(k_at, mask=inside[:, None] & (dim < D)[None, :], other=0.0)
            v_at = tail_v_ptr + b * tvb + h * tvh + slot[:, None] * tvn + out_dim[None, :]
            values = tl.load(v_at, mask=inside[:, None] & (out_dim < DV)[None, :], other=0.0)
            seen = here[:, None] & inside[None, :]
            if MASKED:
                mask_at = seen_ptr + b * sb + h * sh + asked[:, None] * sq
                seen = seen & load_mask(mask_at, sn, slot[None, :], seen)
            most, total, sums = step(q, keys, values, seen, most, total, sums, scale, cap, CAPPED, UPCAST)

    at = (owner * parts + part) * group * count + line
    tl.store(most_ptr + at, most, mask=here)
    tl.store(total_ptr + at, total, mask=here)
    tl.store(part_ptr + at[:, None] * DV + out_dim[None, :], sums, mask=here[:, None] & (out_dim < DV)[None, :])


@triton.jit(do_not_specialize=["heads", "group", "count", "parts"])
def combine_parts(
    part_ptr, most_ptr, total_ptr, sink_ptr, out_ptr, heads, group, count, parts,
    DV: tl.constexpr, HELD_V: tl.constexpr, ROWS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Join the parts of `ROWS` queries of one KV head; a query that sees nothing gets zeros."""
    lines = group * count
    tiles = tl.cdiv(lines, ROWS)
    pid = tl.program_id(0)
    owner, b, h = row_of(pid // tiles, heads)
    line = (pid % tiles) * ROWS + tl.arange(0, ROWS)
    here = line < lines
    dim = tl.arange(0, HELD_V)
    there = here[:, None] & (dim < DV)[None, :]
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, HELD_V], tl.float32)
    if SINKS:
        most = tl.load(sink_ptr + h * group + line // count, mask=here, other=0.0).to(tl.float32)
        total = tl.where(here, 1.0, 0.0)
    for part in range(0, parts):
        at = (owner * parts + part) * lines + line
        new = tl.load(most_ptr + at, mask=here, other=float("-inf"))
        larger = tl.maximum(most, new)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        old, share = tl.exp(most - shift), tl.exp(new - shift)
        total = total * old + tl.load(total_ptr + at, mask=here, other=0.0) * share
        values = tl.load(part_ptr + at[:, None] * DV + dim[None, :], mask=there, other=0.0)
        sums = sums * old[:, None] + values * share[:, None]
        most = larger
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    # [B, Hq, q, Dv]: a line is query head `line // count` of the group and query `line % count`.
    spot = ((b * heads + h) * lines + line)[:, None] * DV + dim[None, :]
    tl.store(out_ptr + spot, result.to(out_ptr.dtype.element_ty), mask=there)
