"""Scores in 8 bits each: what a page holds of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float32, Int, UInt8
    from numpy import ndarray as Array

_LEVELS = 255
_BEND = 8.0  # most that the levels are bent to one side


def quantise(
    scores: Float32[Array, " M"], counts: Int[Array, " R"]
) -> tuple[UInt8[Array, " M"], Float32[Array, "R 3"]]:
    """Return 256 levels per head, closer together where most of its scores are.

    Attention has few large scores among thousands of small ones; the levels are bent so that the median is in the
    middle of them. The order of scores is kept, up to equal levels.

    Args:
        scores: fp32, the entries of one head after those of another.
        counts: entries of each head.

    Returns:
        The levels, and for each head the lowest score, the highest one, and the exponent that levels are bent with.
    """
    codes = np.zeros(scores.shape, dtype=np.uint8)
    scales = np.ones((len(counts), 3), dtype=np.float32)
    ends = np.cumsum(counts)
    for r, (start, end) in enumerate(zip(ends - counts, ends, strict=True)):
        head = scores[start:end].astype(np.float64)
        finite = head[np.isfinite(head)]  # what must go whatever its score may have any
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
        scales[r] = low, high, 1.0
        if not high > low:
            continue
        share = (np.clip(np.nan_to_num(head, nan=low), low, high) - low) / (high - low)
        middle = np.clip(np.median(share), 1e-6, 1 - 1e-6)
        bend = np.clip(np.log(0.5) / np.log(middle), 1 / _BEND, _BEND)
        scales[r, 2] = bend
        codes[start:end] = np.rint(_LEVELS * share**bend)
    return codes, scales
