"""Ways to make the scores of a head commensurable: all are per row and head, over the slots of a mask only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvpolicy.types import Keys, Mask, Scores, Values

ROUNDING = 4e-6
"""Numbers that are equal but for the order of their sums differ by a smaller share."""


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
        scores: fp32 `[B, H, N]`, finite where a result is used.
        mask: bool `[B, H, N]`, the slots whose extremes count; the others are mapped by the same line.

    Returns:
        fp32 `[B, H, N]`.
    """
    low, high = extremes(scores, mask)
    width = high - low
    return torch.where(width > 0, (scores - low) / torch.where(width > 0, width, 1.0), 0.0)


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
    inside = torch.where(mask, scores, float("inf")).contiguous()
    ordered = inside.sort(-1).values
    below = torch.searchsorted(ordered, inside)
    upto = torch.searchsorted(ordered, inside, right=True)
    return torch.where(mask, (below + upto - 1) / 2, 0.0)


def levelled(scores: Scores, mask: Mask, near: float = ROUNDING) -> Scores:
    """Make scores that are nearly equal equal: all of a chain of near neighbours take its lowest score.

    Args:
        scores: fp32 `[B, H, N]`, finite where `mask`.
        mask: bool `[B, H, N]`.
        near: neighbours in the order of scores are near when they differ by at most this share of the larger magnitude.

    Returns:
        fp32 `[B, H, N]`, 0 outside the mask; NaN and infinity stay where they are.
    """
    ordered, slots = torch.where(mask, scores, float("inf")).sort(-1)
    low, high = ordered[..., :-1], ordered[..., 1:]
    apart = high - low > near * torch.maximum(low.abs(), high.abs())
    first = pad(apart, (1, 0), value=True)[..., : ordered.shape[-1]]
    lowest = torch.where(first, ordered, float("-inf")).cummax(-1).values
    level = torch.zeros_like(ordered).scatter_(-1, slots, lowest)
    return torch.where(scores.isfinite(), level, scores).masked_fill(~mask, 0.0)


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
