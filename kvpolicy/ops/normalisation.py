"""Ways to make the scores of a head commensurable: all are per row and head, over the slots of a mask only."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvpolicy.ops.order import in_order
from kvpolicy.types import Keys, Mask, Scores, Values

ROUNDING = 4e-6
"""Numbers that are equal but for the order of their sums differ by a smaller share."""
_MANTISSA = 23  # bits of an fp32 number behind its first one


def lengths(vectors: Keys | Values, order: float = 2.0) -> Scores:
    """Return the norm of each vector of `[B, H, N, D]`, any float dtype, summed in fp32 at least: fp32 `[B, H, N]`."""
    wide = torch.promote_types(vectors.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(vectors, order, dim=-1, dtype=wide)
    return norms.float()


def by_maximum(scores: Scores, mask: Mask) -> Scores:
    """Divide by the largest magnitude; a head of zeros stays zero.

    Args:
        scores: fp32 `[B, H, N]`, finite where `mask`.
        mask: bool `[B, H, N]`.

    Returns:
        fp32 `[B, H, N]`, within [-1, 1]; 0 outside the mask.
    """
    inside = torch.where(mask, scores, 0.0)
    largest = inside.abs().amax(-1, keepdim=True)
    return inside / torch.where(largest > 0, largest, 1.0)


def min_max(scores: Scores, mask: Mask) -> Scores:
    """Map the smallest score of the mask to 0 and the largest to 1; equal scores all become 0.

    Args:
        scores: fp32 `[B, H, N]`, finite where `mask` and where a result is used; NaN in the mask makes its head NaN.
        mask: bool `[B, H, N]`, the slots whose extremes count; the others are mapped by the same line.

    Returns:
        fp32 `[B, H, N]`.
    """
    low, high = extremes(scores, mask)
    width = high - low
    still = width == 0  # and not `width > 0`, which NaN is not either: it would come out as 0
    return torch.where(still, 0.0, (scores - low) / torch.where(still, 1.0, width))


def mean_matched(scores: Scores, mask: Mask, like: Scores) -> Scores:
    """Min-max scores, stretched until their mean is the mean magnitude of `like` (MixKV).

    Args:
        scores: fp32 `[B, H, N]`, finite where a result is used.
        mask: bool `[B, H, N]`, the slots whose extremes and means count.
        like: fp32 `[B, H, N]`, finite where `mask`.

    Returns:
        fp32 `[B, H, N]`; 0 everywhere if the scores of the mask are all equal.
    """
    unit = min_max(scores, mask)
    mean = torch.where(mask, unit, 0.0).sum(-1, keepdim=True)
    wanted = torch.where(mask, like, 0.0).abs().sum(-1, keepdim=True)
    return unit * torch.where(mean > 0, wanted / torch.where(mean > 0, mean, 1.0), 0.0)


def z_scores(scores: Scores, mask: Mask) -> Scores:
    """Subtract the mean and divide by the standard deviation; equal scores all become 0.

    Args:
        scores: fp32 `[B, H, N]`, finite where `mask`.
        mask: bool `[B, H, N]`.

    Returns:
        fp32 `[B, H, N]`, 0 outside the mask.
    """
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    # From the smallest score on: the sum of equal scores is then exactly 0, and rounding makes no deviation of it.
    low, _ = extremes(scores, mask)
    above = torch.where(mask, scores - low, 0.0)
    centred = torch.where(mask, above - above.sum(-1, keepdim=True) / count, 0.0)
    deviation = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    return centred / torch.where(deviation > 0, deviation, 1.0)


def ranks(scores: Scores, mask: Mask) -> Scores:
    """Return the share of the other slots with a lower score, equal ones counted as half.

    Args:
        scores: fp32 `[B, H, N]`, finite where `mask`.
        mask: bool `[B, H, N]`.

    Returns:
        fp32 `[B, H, N]`, from 0 for the lowest to 1 for the highest; 0 outside the mask and for a slot that is alone.
    """
    return places(scores, mask) / (mask.sum(-1, keepdim=True) - 1).clamp(min=1)


def places(scores: Scores, mask: Mask) -> Scores:
    """Count the other slots with a lower score, equal ones as half.

    Args:
        scores: fp32 `[B, H, N]`, finite where `mask`.
        mask: bool `[B, H, N]`.

    Returns:
        fp32 `[B, H, N]`, multiples of 1/2, exact for fewer than 2^23 slots; 0 outside the mask.
    """
    # Adding 0 makes -0 the number that it equals.
    ordered, slots = in_order(torch.where(mask, scores + 0.0, float("inf")))
    place = torch.arange(ordered.shape[-1], device=scores.device).expand(ordered.shape)
    new = pad(ordered[..., 1:] != ordered[..., :-1], (1, 1), value=True)
    below = torch.where(new[..., :-1], place, 0).cummax(-1).values
    upto = torch.where(new[..., 1:], place, ordered.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    middle = torch.empty_like(ordered).scatter_(-1, slots, (below + upto) / 2)
    return torch.where(mask, middle, 0.0)


def levelled(scores: Scores, mask: Mask, near: float = ROUNDING) -> Scores:
    """Make scores equal that differ by no more than rounding, so that ties go by position on every machine.

    Neighbours in the order of a head's scores are near when they differ by at most `near` of the larger magnitude. A
    run of near neighbours whose ends are near too is one level and takes its lowest score. A longer run is cut into
    levels where fp32 numbers pass a multiple of a power of two of their last place, the largest that is within `near`.
    No level is wider than `near`, and the order of scores stays.

    Equal scores that rounding has set apart lie close together with room around them: gaps say where such a level
    begins, and rounding does not move a gap. Where scores lie so dense that there is no gap, the cuts stand at fixed
    numbers. Counted from the first score of the level instead, a rounding error would move all levels above it.

    Args:
        scores: fp32 `[B, H, N]`, finite where `mask`.
        mask: bool `[B, H, N]`.
        near: share of a score, at least 0 and below 1.

    Returns:
        fp32 `[B, H, N]`, 0 outside the mask; NaN and infinity stay where they are. O(N log N) per head.
    """
    known = mask & scores.isfinite()
    # Adding 0 makes -0 the number whose bits are those of its equal.
    ordered, slots = in_order(torch.where(known, scores + 0.0, torch.finfo(torch.float32).max))
    low, high = ordered[..., :-1], ordered[..., 1:]
    apart = pad(_apart(low, high, near), (1, 0), value=True)[..., : ordered.shape[-1]]
    lowest = torch.where(apart, ordered, float("-inf")).cummax(-1).values
    last = pad(apart[..., 1:], (0, 1), value=True)[..., : ordered.shape[-1]]
    highest = torch.where(last, ordered, float("inf")).flip(-1).cummin(-1).values.flip(-1)
    bits = ordered.view(torch.int32)
    cell = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> max(math.floor(math.log2(near)) + _MANTISSA, 0) if near else bits
    cut = _apart(lowest, highest, near)[..., 1:] & (cell[..., 1:] != cell[..., :-1])
    apart[..., 1:] |= cut
    lowest = torch.where(apart, ordered, float("-inf")).cummax(-1).values
    level = torch.empty_like(ordered).scatter_(-1, slots, lowest)
    return torch.where(known, level, torch.where(mask, scores, 0.0))


def _apart(low: Tensor, high: Tensor, near: float) -> Tensor:
    """Say whether scores, the lower ones first, differ by more than `near` of the larger magnitude."""
    return high - low > near * torch.maximum(low.abs(), high.abs())


def from_lowest(scores: Scores, mask: Mask) -> Scores:
    """Count scores from the lowest of their head where that is below 0; others stay, fp32 `[B, H, N]`.

    For formulas that multiply a score and mean one that is not negative.
    """
    return scores - extremes(scores, mask)[0].clamp(max=0)


def extremes(scores: Scores, mask: Mask) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest score of the mask, fp32 `[B, H, 1]` each; 0 where the mask is empty."""
    held = mask.any(-1, keepdim=True)
    low = torch.where(mask, scores, float("inf")).amin(-1, keepdim=True)
    high = torch.where(mask, scores, float("-inf")).amax(-1, keepdim=True)
    return torch.where(held, low, 0.0), torch.where(held, high, 0.0)
