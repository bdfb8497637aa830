"""Scorers of the oracle that ask what the attention's output loses with an entry; plain loops, float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvsupport import oracle_memory as memory
from kvsupport import oracle_scores as scores
from kvsupport.oracle_scores import HeadView, Scorer


def lines(observe: int, head: HeadView) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield weights and logits `[n]` of each of the last queries, one query head at a time."""
    for query, position in zip(head.queries[-observe:], head.query_positions[-observe:], strict=True):
        visible = [place <= position for place in head.positions]
        for g, logits in enumerate(scores.logits_of(query, head.keys, head.info)):
            sink = None if head.sinks is None else float(head.sinks[g])
            yield scores.softmax_among(logits, visible, sink), logits


def output_error(p: Any, head: HeadView) -> Tensor:
    """How far the output moves: it is computed without the entry, and the others share its part."""
    base = memory.base_of(p.base, head)
    base = base - min(float(base.min()), 0.0)
    if float(base.sum()) == 0.0:
        return torch.zeros_like(base)
    share = base / base.sum()
    result = []
    for n, value in enumerate(head.values):
        left = [m for m in range(len(base)) if m != n]
        rest = max(sum(float(share[m]) for m in left), 1e-6)
        if p.output == "mean":
            result.append(float(share[n]) / rest * float((head.values.mean(0) - value).norm()))
        else:
            without = sum((share[m] * head.values[m] for m in left), torch.zeros_like(value)) / rest
            result.append(float((share @ head.values - without).norm()))
    return torch.tensor(result, dtype=torch.float64)


def optimal_brain(p: Any, head: HeadView) -> Tensor:
    """Squared lengths of the steps that the outputs take when a key, a value or both go to 0."""
    total = torch.zeros(len(head.positions), dtype=torch.float64)
    for weights, logits in lines(p.observe, head):
        output = weights @ head.values
        for n, value in enumerate(head.values):
            step = torch.zeros_like(value)
            if p.prune in ("value", "joint"):
                step = step - weights[n] * value
            if p.prune in ("key", "joint"):
                step = step - weights[n] * logits[n] * (value - output)
            total[n] += float(step @ step)
    return total / head.info.groups


IMPORTANCE: dict[str, Scorer] = {"optimal_brain": optimal_brain, "output_error": output_error}
