"""Top-k in Triton; the definition is `kvpolicy.ops.selection`."""

from __future__ import annotations

import torch

from kvpolicy.ops import arguments
from kvpolicy.types import Counts, KeepIndices, Mask, Scores
from kvpolicy_kernels.launching import as_bytes, launch, padded

RESIDENT = 4096
"""Slots of a row that fit into the registers of one program."""


def top_k(scores: Scores, counts: Counts, protected: Mask, valid: Mask, *, width: int | None = None) -> KeepIndices:
    """As `kvpolicy.ops.top_k`; NaN ranks below every number. Without `width` the counts are read from the device.

    Raises ValueError when arguments do not fit together.
    """
    arguments.top_k(scores, counts, protected, valid)
    batch, heads, n = scores.shape
    device = scores.device
    columns = (int(counts.max()) if counts.numel() else 0) if width is None else width
    indices = torch.empty(batch, heads, columns, dtype=torch.int64, device=device)
    resident = n <= RESIDENT
    block = padded(n, least=256) if resident else 1024
    launch(
        "selection.select_top", batch * heads,
        scores, *scores.stride(), as_bytes(protected), *protected.stride(), as_bytes(valid), *valid.stride(),
        counts, *counts.stride(), indices, n, heads, columns,
        BLOCK=block, RESIDENT=resident, warps=4 if block <= 1024 else 8,
    )  # fmt: skip
    return KeepIndices(indices, counts)
