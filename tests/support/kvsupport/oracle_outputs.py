"""Scorers of the oracle that ask what the attention's output loses with an entry; plain loops, float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.loading.installed import catalog
from kvsupport import oracle_memory as memory
from kvsupport import oracle_scores as scores
from kvsupport.oracle_scores import HeadView, Mixer, Scorer, turn


def lines(observe: int, head: HeadView) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield weights and logits `[n]` of each of the last queries, one query head at a time."""
    for query, position in zip(head.queries[-observe:], head.query_positions[-observe:], strict=True):
        visible = [place <= position for place in head.positions]
        for g, logits in enumerate(scores.logits_of(query, head.keys, head.info)):
            sink = None if head.sinks is None else float(head.sinks[g])
            yield scores.softmax_among(logits, visible, sink), logits


def output_error(p: Any, head: HeadView) -> Tensor:
    """How far the output moves: it is computed without the entry, and the others share its part."""
    base = base_of(p.base, head)
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


def output_weighted(p: Any, head: HeadView) -> Tensor:
    """The base, counted from its lowest where that is negative, times what the value does to the output."""
    if head.info.output_projection is None:
        raise ValueError("the trace knows no output projection")
    base = base_of(p.base, head)
    norms = []
    for value in head.values:
        outputs = [value @ projection.double() for projection in head.info.output_projection[head.head]]
        norms.append(sum(float(output.abs().sum()) for output in outputs) / len(outputs))
    return (base - min(float(base.min()), 0.0)) * torch.tensor(norms, dtype=torch.float64)


def worst_case(p: Any, head: HeadView) -> Tensor:
    """The largest smoothed weight of any query and query head, and no less than a head's mean."""
    first = head.query_positions[-p.observe :][0]
    older = [place < first for place in head.positions]
    worst = torch.zeros(len(older), dtype=torch.float64)
    for weights, _ in lines(p.observe, head):
        plain = torch.where(torch.tensor(older), weights, 0.0)
        smoothed = scores.smooth(plain, older, p.smooth, "mean_zero_padded")
        if float(smoothed.sum()):
            worst = torch.maximum(worst, smoothed * (float(plain.sum()) / float(smoothed.sum())))
    if not any(older):
        return worst
    mean = float(worst.sum()) / sum(older)
    among = [max(float(value), p.prior * mean) for value, yes in zip(worst, older, strict=True) if yes]
    left = iter(among)
    return torch.tensor([next(left) if yes else max(among) for yes in older], dtype=torch.float64)


def value_capacity(p: Any, head: HeadView) -> Tensor:
    """What each value adds to the log-determinant, to first order: its weight times its quadratic form."""
    query = head.queries[-p.observe :].mean((0, 1))
    weights = [math.exp(p.sharpness * _cosine(key, query)) for key in head.keys]
    whole = torch.eye(head.values.shape[1], dtype=torch.float64)
    for weight, value in zip(weights, head.values, strict=True):
        whole = whole + weight * torch.outer(value, value)
    found = [
        weight * float(value @ torch.linalg.solve(whole, value))
        for weight, value in zip(weights, head.values, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)


def _cosine(one: Tensor, other: Tensor) -> float:
    lengths = float(one.norm() * other.norm())
    return float(one @ other) / lengths if lengths else 0.0


def greedy_values(p: Any, head: HeadView) -> Tensor:
    """The place of each entry in the greedy order, from the end."""
    base = base_of(p.base, head)
    width = float(base.max() - base.min())
    plain = [(float(x) - float(base.min())) / width if width else 0.0 for x in base]
    count = len(plain)
    taken: list[int] = []
    while len(taken) < count:
        worth = {
            n: plain[n] - p.weight * (max(_cosine(head.values[n], head.values[j]) for j in taken) if taken else 0.0)
            for n in range(count)
            if n not in taken
        }
        level = scores.levelled(torch.tensor(list(worth.values()), dtype=torch.float64)).tolist()
        order = sorted(zip(level, worth, strict=True), key=lambda pair: (-pair[0], pair[1]))
        taken += [n for _, n in order[: p.step]]
    return torch.tensor([float(count - taken.index(n)) for n in range(count)], dtype=torch.float64)


def beacon_attention(p: Any, head: HeadView) -> Tensor:
    """The attention of queries that are far from each other, as if they were asked next."""
    places = head.query_positions[-p.observe :][::-1]
    queries = [
        turn(query, head.info, [head.seen - place] * len(query))
        for query, place in zip(head.queries[-p.observe :].flip(0), places, strict=True)
    ]

    def alike(i: int, j: int) -> float:
        return sum(_cosine(a, b) for a, b in zip(queries[i], queries[j], strict=True)) / len(queries[i])

    chosen = [0]
    while len(chosen) < min(p.beacons, len(queries)):
        near = {i: max(alike(i, j) for j in chosen) for i in range(len(queries)) if i not in chosen}
        level = scores.levelled(torch.tensor(list(near.values()), dtype=torch.float64)).tolist()
        chosen.append(min(zip(level, near, strict=True))[1])
    owners = [i if i in chosen else max(chosen, key=lambda j: alike(i, j)) for i in range(len(queries))]
    rows = []
    for j in chosen:
        logits = scores.logits_of(queries[j], head.keys, head.info)
        sinks = [None] * len(logits) if head.sinks is None else head.sinks.tolist()
        every = [True] * len(head.positions)
        each = [scores.softmax_among(line, every, sink) for line, sink in zip(logits, sinks, strict=True)]
        rows.append(torch.stack(each).mean(0))
    if p.over == "max":
        return torch.stack(rows).max(0).values
    share = [owners.count(j) / len(owners) for j in chosen]
    return sum((s * row for s, row in zip(share, rows, strict=True)), torch.zeros_like(rows[0]))


def attention_mass(p: Any, importance: Tensor, redundancy: Tensor, head: HeadView) -> Tensor:
    """Blocks with most of the importance, then blocks with keys that differ."""
    count = len(head.positions)
    inside = [n for n in range(count - min(p.recent, count)) if head.positions[n] >= p.sinks]
    result = torch.zeros(count, dtype=torch.float64)
    if not inside:
        return result
    lowest = min(*(float(importance[n]) for n in inside), 0.0)
    blocks: dict[int, list[int]] = {}
    for n in inside:
        blocks.setdefault(head.positions[n] // p.size, []).append(n)
    sums = {c: sum(float(importance[n]) - lowest for n in members) for c, members in blocks.items()}
    level = dict(
        zip(sums, scores.levelled(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist(), strict=True)
    )
    first: list[int] = []
    for c in sorted(blocks, key=lambda c: (-level[c], c)):
        if sum(sums[x] for x in first) < p.mass * sum(sums.values()) * (1 - ops.ROUNDING):
            first.append(c)
    others = [n for c, members in blocks.items() if c not in first for n in members]
    diverse: dict[int, float] = {}
    for c, members in blocks.items():
        if c in first:
            continue
        diverse[c] = 0.0
        for n in members:
            cosines = {m: 0.0 if m == n else _cosine(head.keys[n], head.keys[m]) for m in inside}
            mean = sum(cosines.values()) / len(inside)
            diverse[c] -= sum(cosines[m] for m in others if cosines[m] >= mean) / len(others)
    low, high = min(diverse.values(), default=0.0), max(diverse.values(), default=0.0)
    best = max(abs(x) for x in level.values()) or 1.0
    for c, members in blocks.items():
        plain = 2 + level[c] / best if c in first else (diverse[c] - low) / (high - low) if high > low else 0.0
        for n in members:
            result[n] = plain
    return result


IMPORTANCE: dict[str, Scorer] = {
    "beacon_attention": beacon_attention,
    "greedy_values": greedy_values,
    "optimal_brain": optimal_brain,
    "output_error": output_error,
    "output_weighted": output_weighted,
    "value_capacity": value_capacity,
    "worst_case": worst_case,
}
MIXERS: dict[str, Mixer] = {"attention_mass": attention_mass}


def base_of(component: Any, head: HeadView) -> Tensor:
    """The scores of a component that another one holds."""
    name = catalog().name_of(type(component))
    return scores.asked(IMPORTANCE[name], component, head) if name in IMPORTANCE else memory.base_of(component, head)
