"""What each head loses at each budget, and the best split of every budget (LU-KV)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.runtimes.hf.calibration.watching import Attended, watch

STEPS = 100
"""Budgets are measured in hundredths of the entries."""
LEAST = 2
"""Hundredths that every head keeps."""
OBSERVE = 32
"""Queries before the cut, by whose attention the entries are ranked."""
FRACTIONS = tuple(round(0.05 * step, 2) for step in range(1, 20))


def loss_curves(model: PreTrainedModel, chunks: Iterable[Tensor], horizon: int) -> Tensor:
    """Return the share of later queries' attention output weight that is lost at each budget, fp32 `[L, H, STEPS + 1]`.

    The entries before a cut, `horizon` tokens before the end of each chunk, are ranked by the attention of the last
    `OBSERVE` queries before it, as SnapKV would; the loss at a budget is the attention that the queries after the cut
    pay to the entries beyond it, each weighted with the length of its value, as a share of all that they pay.
    """
    losses: list[Tensor] = []

    def look(seen: Attended) -> None:
        cut = seen.keys.shape[1] - horizon
        places = torch.arange(seen.keys.shape[1], device=seen.keys.device)
        size = torch.linalg.vector_norm(seen.values, dim=-1)
        before = seen.weights(places[cut - OBSERVE : cut])[..., :cut].mean((1, 2))
        after = seen.weights(places[cut:]).mean((1, 2)) * size
        order = before.argsort(dim=-1, descending=True, stable=True)
        kept = after[:, :cut].gather(-1, order).cumsum(-1) / after.sum(-1, keepdim=True).clamp(min=1e-30)
        kept = torch.nn.functional.pad(kept, (1, 0))
        budgets = torch.linspace(0, cut, STEPS + 1, device=kept.device).round().long()
        losses.append((kept[:, -1:] - kept[:, budgets]).cpu())

    count = 0
    for chunk in chunks:
        watch(model, chunk, look)
        count += 1
    curves: Tensor = torch.stack(losses).unflatten(0, (count, -1)).mean(0)
    return curves


def best_splits(losses: Tensor) -> dict[str, Tensor]:
    """Return which share each head should keep so that the sum of the losses is least, for every budget.

    Args:
        losses: `[L, H, STEPS + 1]`, falling.

    Returns:
        ``fractions`` `[P]` and ``kept`` `[P, L, H]`, whose mean is the fraction. The curves are taken as convex (their
        lower hull), for which giving each hundredth to the head that gains most from it is the optimum.
    """
    layers, heads, points = losses.shape
    gains = -_lower_hull(losses.double().reshape(-1, points)).diff(dim=-1)
    gains = gains[:, LEAST:]
    order = gains.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    rank = rank.reshape(gains.shape)
    kept = []
    for fraction in FRACTIONS:
        units = round(fraction * STEPS) * layers * heads - LEAST * layers * heads
        kept.append(((rank < units).sum(-1) + LEAST).reshape(layers, heads) / STEPS)
    return {"fractions": torch.tensor(FRACTIONS), "kept": torch.stack(kept).float()}


def _lower_hull(curves: Tensor) -> Tensor:
    """Return the largest convex function below each curve `[C, X]` at equally spaced points."""
    count = curves.shape[1]
    places = torch.arange(count)
    result = torch.empty_like(curves)
    for index, curve in enumerate(curves.tolist()):
        corners: list[int] = []
        for x in range(count):
            while len(corners) > 1 and _above(curve, corners[-2], corners[-1], x):
                corners.pop()
            corners.append(x)
        at = torch.tensor(corners)
        right = torch.searchsorted(at, places).clamp(min=1)
        left_x, right_x = at[right - 1], at[right]
        heights = curves[index]
        along = (places - left_x) / (right_x - left_x)
        result[index] = torch.lerp(heights[left_x], heights[right_x], along.double())
    return result


def _above(curve: list[float], left: int, middle: int, right: int) -> bool:
    """Whether the middle point lies on or above the line from left to right."""
    return (curve[middle] - curve[left]) * (right - left) >= (curve[right] - curve[left]) * (middle - left)
