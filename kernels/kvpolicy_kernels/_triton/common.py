"""What several kernels share.

The interpreter keeps bfloat16 as bare bits, so every load is widened to fp32 before anything is done with it, and
operands of `dot` are when `UPCAST` says that the interpreter runs. Products of two bf16 numbers are exact in fp32.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr(2**31 - 1)


@triton.jit
def dot(left, right, UPCAST: tl.constexpr):
    """Product of two tiles in fp32."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def precise_dot(left, right, UPCAST: tl.constexpr):
    """Product of two tiles to fp32's precision, fp32 operands too: six products of their parts in bf16."""
    if left.dtype == tl.float32 and not UPCAST:
        return tl.dot(left, right, input_precision="bf16x6")
    return dot(left, right, UPCAST)


@triton.jit
def capped(x, cap):
    """``cap * tanh(x / cap)``; near 0 by its series, where the exponential would lose digits."""
    y = x / cap
    z = tl.minimum(y * y, 0.25)
    series = -929569.0 / 638512875.0
    series = series * z + 21844.0 / 6081075.0
    series = series * z - 1382.0 / 155925.0
    series = series * z + 62.0 / 2835.0
    series = series * z - 17.0 / 315.0
    series = series * z + 2.0 / 15.0
    series = series * z - 1.0 / 3.0
    small = y + y * z * series
    e = tl.exp(-2.0 * tl.abs(y))
    large = tl.where(y < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    return cap * tl.where(tl.abs(y) < 0.5, small, large)


@triton.jit
def tile_of(n, heads, TILE: tl.constexpr):
    """Return row, batch index, head and columns of a program of a flat grid over (rows, tiles)."""
    tiles = tl.cdiv(n, TILE)
    pid = tl.program_id(0)
    tile = pid % tiles
    row, b, h = row_of(pid // tiles, heads)
    return row, b, h, tile, tiles, tile * TILE + tl.arange(0, TILE)


@triton.jit
def row_of(row, heads):
    """Return row, batch index and head as 64-bit numbers; divided as 32-bit ones, which is an instruction or two."""
    return row.to(tl.int64), (row // heads).to(tl.int64), (row % heads).to(tl.int64)


@triton.jit
def load_mask(pointer, stride, column, inside):
    """Load bytes of a bool tensor."""
    return tl.load(pointer + column * stride, mask=inside, other=0) != 0
