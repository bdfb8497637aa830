"""Attention over a ragged cache in Triton; the definition is `kvpolicy.ops.ragged`."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvpolicy.ops import arguments
from kvpolicy.ops.ragged import Blocks
from kvpolicy_kernels import served
from kvpolicy_kernels.launching import as_bytes, launch, padded, upcast

TILE = 64
NARROW = 32
"""Slots of a tile of wide keys or values, of which fewer fit into registers and shared memory."""
_PROGRAMS = 256  # about two per multiprocessor of a large GPU
_MOST_SPLITS = 32

_starts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def ragged_attention(
    queries: Float[Tensor, "B Hq q D"],
    base: Blocks,
    tail_keys: Float[Tensor, "B H T D"],
    tail_values: Float[Tensor, "B H T Dv"],
    visible: Bool[Tensor, "#B #H q T"] | None,
    *,
    scale: float,
    softcap: float | None = None,
    attention_sinks: Float[Tensor, "H G"] | None = None,
) -> Float[Tensor, "B Hq q Dv"]:
    """As `kvpolicy.ops.ragged_attention`.

    Raises:
        UnsupportedError: a layout has no kernel.
        ValueError: arguments do not fit together.
    """
    served.require(served.ragged_attention(queries, base, tail_keys, tail_values, visible))
    batch, query_heads, count, dim = queries.shape
    heads, tail = tail_keys.shape[1:3]
    out_dim = tail_values.shape[-1]
    blocks, slots = base.keys.shape[:2]
    device = queries.device
    arguments.ragged_attention(queries, base, tail_keys, tail_values, visible)
    group = query_heads // heads
    owners, lines = batch * heads, group * count
    out = torch.empty(batch, query_heads, count, out_dim, dtype=queries.dtype, device=device)
    average = -(-blocks * slots // max(1, owners))
    held, held_out = padded(dim), padded(out_dim)
    wide = max(held, held_out) > 128
    tile = NARROW if wide else TILE
    splits = max(1, min(_MOST_SPLITS, -(-_PROGRAMS // max(1, owners)), -(-average // tile)))
    rows = min(64, padded(lines))
    tiles = -(-lines // rows)
    parts = torch.empty(owners, splits + 1, lines, out_dim, dtype=torch.float32, device=device)
    most = torch.empty(owners, splits + 1, lines, dtype=torch.float32, device=device)
    total = torch.empty_like(most)
    # A base without blocks still has to be a pointer, which nothing is read from.
    filled = base.filled if blocks else base.filled.new_zeros(1)
    seen = None if visible is None else as_bytes(visible).expand(batch, heads, count, tail)
    launch(
        "ragged.attend_part", owners * tiles * (splits + 1),
        queries, *queries.stride()[:3], base.keys, base.values, _start(base.owner, owners), filled,
        tail_keys, *tail_keys.stride()[:3], tail_values, *tail_values.stride()[:3],
        seen, *((0, 0, 0, 0) if seen is None else seen.stride()), parts, most, total,
        scale, float(softcap or 0.0), heads, group, count, splits, tail, slots,
        D=dim, HELD=held, DV=out_dim, HELD_V=held_out, ROWS=rows, TILE=tile,
        MASKED=seen is not None, CAPPED=softcap is not None, UPCAST=upcast(),
        warps=8 if rows >= 64 else 4, stages=2 if seen is None or held <= 32 else 1,
    )  # fmt: skip
    sinks = None if attention_sinks is None else attention_sinks.contiguous()
    launch(
        "ragged.combine_parts", owners * tiles,
        parts, most, total, sinks, out, heads, group, count, splits + 1,
        DV=out_dim, HELD_V=held_out, ROWS=rows, SINKS=sinks is not None, warps=8 if rows * held_out > 1 << 13 else 4,
    )  # fmt: skip
    return out


def _start(owner: Tensor, owners: int) -> Tensor:
    """Return int64 `[owners + 1]`, the first block of each owner; found once for each base, which never changes."""
    known: Tensor | None = _starts.get(owner)
    if known is None or known.numel() != owners + 1:
        known = torch.searchsorted(owner, torch.arange(owners + 1, device=owner.device))
        _starts[owner] = known
    return known
