"""Compaction in Triton; the definition is `kvpolicy.ops.compaction`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.ops import arguments
from kvpolicy.types import KeepIndices
from kvpolicy_kernels.launching import launch, padded

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LANES = 32
"""Lanes of a program that serves slots of one word each, a row per lane."""
MOST_WORDS = 1024
"""Elements per slot; each is a lane of one program."""


def as_words(tensor: Tensor) -> Tensor | None:
    """Return `[B, H, capacity, words]` integers over the same memory, or None when a slot is not contiguous."""
    sizes, strides = tensor.shape[3:], tensor.stride()[3:]
    run = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != run:
            return None
        run *= size
    if run > MOST_WORDS or tensor.element_size() > 8:
        return None
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return None
    one = tensor.element_size()
    flat = tensor.as_strided((*tensor.shape[:3], run), (*tensor.stride()[:3], 1)).view(_WORDS[one])
    byte_sizes = [run * one, flat.storage_offset() * one, flat.data_ptr(), *(s * one for s in flat.stride()[:3])]
    width = next(w for w in (8, 4, 2, 1) if w >= one and all(b % w == 0 for b in byte_sizes)) if run > 1 else one
    return flat if width == one else flat.view(_WORDS[width])


def compact(tensor: Tensor, kept: KeepIndices) -> None:
    """As `kvpolicy.ops.compact`. Raises ValueError when arguments do not fit together."""
    arguments.compact(tensor, kept)
    batch, heads = tensor.shape[:2]
    columns = kept.indices.shape[2]
    words = as_words(tensor)
    if words is None:
        raise ValueError(
            f"each slot of a storage must be a contiguous piece of its own of at most {MOST_WORDS} elements, but these "
            f"are {list(tensor.shape)} with strides {list(tensor.stride())}; make them contiguous."
        )
    rows, width = batch * heads, words.shape[3]
    if width == 0 or columns == 0:
        return
    spread = padded(width, least=1)
    rows_each = max(1, LANES // spread)
    launch(
        "compaction.move_kept", -(-rows // rows_each),
        words, *words.stride()[:3], kept.indices, *kept.indices.stride(), rows, heads, columns,
        WIDTH=width, PADDED=spread, ROWS=rows_each, BATCH=8, warps=max(1, spread // 32),
    )  # fmt: skip
