"""Kernel density of keys: every tile of keys meets all tiles, in order of priority where that counts."""

import triton
import triton.language as tl

from kvpolicy_kernels._triton.common import load_mask, precise_dot, tile_of


@triton.jit
def load_slots(order_ptr, row, place, n, ORDERED: tl.constexpr):
    """Slots of some places of the order; the places themselves where there is none."""
    if ORDERED:
        return tl.load(order_ptr + row * n + place, mask=place < n, other=0)
    return place.to(tl.int64)


@triton.jit(do_not_specialize=["n", "heads", "sharpness", "lower", "vb", "vh"])
def sum_near(
    k_ptr, kb, kh, kn, valid_ptr, vb, vh, vn, order_ptr, out_ptr, sharpness, lower, n, heads,
    D: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, ORDERED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Per tile of keys: the mean over all keys of ``w * exp((cosine - 1) / bandwidth)``, itself left out.

    `w` is 1 for keys at an earlier place and `lower` at a later one. Each pair is computed from both sides, which needs
    no addition between programs: sums are made in a fixed order. Wide keys are read in parts, and norms on the way.
    """
    row, b, h, _, tiles, place = tile_of(n, heads, TILE)
    dim = tl.arange(0, D)
    k_row = k_ptr + b * kb + h * kh
    valid_row = valid_ptr + b * vb + h * vh
    slot = load_slots(order_ptr, row, place, n, ORDERED)
    held = load_mask(valid_row, vn, slot, place < n)
    k_at = k_row + slot[:, None] * kn + dim[None, :]
    square = tl.zeros([TILE], tl.float32)
    for part in range(0, PARTS):
        wide = tl.load(k_at + part * D, mask=held[:, None], other=0.0).to(tl.float32)
        square += tl.sum(wide * wide, 1)
    inverse = tl.rsqrt(tl.maximum(square, 1e-30))
    total = tl.zeros([TILE], tl.float32)
    number = tl.zeros([TILE], tl.float32)
    for other in range(0, tiles):
        them = other * TILE + tl.arange(0, TILE)
        their_slot = load_slots(order_ptr, row, them, n, ORDERED)
        there = load_mask(valid_row, vn, their_slot, them < n)
        their_at = k_row + their_slot[:, None] * kn + dim[None, :]
        product = tl.zeros([TILE, TILE], tl.float32)
        square = tl.zeros([TILE], tl.float32)
        for part in range(0, PARTS):
            mine = tl.load(k_at + part * D, mask=held[:, None], other=0.0)
            theirs = tl.load(their_at + part * D, mask=there[:, None], other=0.0)
            product += precise_dot(mine, tl.trans(theirs), UPCAST)
            wide = theirs.to(tl.float32)
            square += tl.sum(wide * wide, 1)
        cosine = product * inverse[:, None] * tl.rsqrt(tl.maximum(square, 1e-30))[None, :]
        # Rounded cosines of twins exceed 1, which a narrow kernel would blow up. NaN stays what it is.
        far = cosine - 1.0
        near = tl.exp(tl.where(far > 0.0, 0.0, far) * sharpness)
        if ORDERED:
            near = tl.where(them[None, :] < place[:, None], near, near * lower)
        near = tl.where(there[None, :] & (them[None, :] != place[:, None]), near, 0.0)
        total += tl.sum(near, 1)
        number += tl.sum(there.to(tl.float32), 0)
    mean = tl.where(held, total / tl.maximum(number, 1.0), 0.0)
    tl.store(out_ptr + row * n + slot, mean, mask=place < n)
