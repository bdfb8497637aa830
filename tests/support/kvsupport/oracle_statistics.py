"""Scorers of the oracle that look at statistics of keys, values and queries; plain loops, float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvpolicy import ops, tables
from kvpolicy.cache.queries.statistics import SKIPPED
from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.loading.installed import catalog
from kvsupport import oracle_scores as scores
from kvsupport.oracle_scores import HeadView, Scorer, levelled, turn


def key_diff(p: Any, head: HeadView) -> Tensor:
    """Minus the cosine to the mean direction."""
    directions = [k / k.norm() if k.norm() > 0 else k for k in head.keys]
    mean = torch.stack(directions).mean(0)
    return torch.stack([-(k @ mean) / mean.norm() for k in directions])


def lag_relative(p: Any, head: HeadView) -> Tensor:
    """How entries stand out against the next partition."""
    count, lag = len(head.positions), p.lag
    if count < p.sinks + 2 * lag:
        places = [1.0 if n < p.sinks else (n - p.sinks) / (count - p.sinks) for n in range(count)]
        return torch.tensor(places, dtype=torch.float64)
    result = torch.ones(count, dtype=torch.float64)
    for first in range(p.sinks, count - 2 * lag + 1, lag):
        both = [_relative(x[first : first + lag], x[first + lag : first + 2 * lag]) for x in (head.keys, head.values)]
        mean = (both[0] + both[1]) / 2
        mean = levelled(mean) if p.ranked else mean
        ranks = torch.tensor([int((mean < x).sum()) / lag for x in mean], dtype=torch.float64)
        result[first : first + lag] = ranks if p.ranked else mean
    return result


def _relative(rows: Tensor, reference: Tensor) -> Tensor:
    low, high = reference.min(0).values, reference.max(0).values
    deviations = []
    for row in rows:
        channels = [
            (row[c] - low[c]) / (high[c] - low[c]) if high[c] - low[c] > 1e-4 * reference[:, c].abs().max() else 0.0
            for c in range(len(row))
        ]
        deviations.append(torch.tensor(channels, dtype=torch.float64).std())
    return torch.softmax(torch.stack(deviations), 0)


def cur(p: Any, head: HeadView) -> Tensor:
    """Shares of squared lengths in windows."""

    def shares(x: Tensor) -> Tensor:
        squares = (x * x).sum(-1)
        return torch.cat([part / part.sum() for part in squares.split(p.window or len(squares))])

    key, value = shares(head.keys), shares(head.values)
    score = {"product": key * value, "mean": (key + value) / 2, "key": key, "value": value}[p.leverage]
    return score / score.sum()


def _table(p: Any, kind: str, name: str, head: HeadView) -> Tensor:
    table = tables.load_table(p.table, kind)
    view = SimpleNamespace(
        num_layers=table.num_layers,
        layer_idx=head.layer,
        head_span=HeadSpan.whole(head.info.heads),
        keys=head.keys,
        device=head.keys.device,
        rope=None if head.info.inv_freq is None else SimpleNamespace(inv_freq=head.info.inv_freq),
    )
    layer: Any = table.layer
    found: Tensor = layer(name, view)[head.head]
    return found.double()


def q_filter(p: Any, head: HeadView) -> Tensor:
    """Projections on the filter."""
    direction = _table(p, "query_filters", "filters", head)
    return torch.stack([k @ direction for k in head.keys])


def _next(head: HeadView) -> int:
    return head.seen - (head.positions[-1] - head.turned_to[-1])


def _sinks(p: Any, head: HeadView, score: Tensor) -> Tensor:
    """Give the first positions the largest score."""
    inside = torch.tensor([position >= p.sinks for position in head.positions])
    most = score[inside].max() if bool(inside.any()) else torch.zeros((), dtype=score.dtype)
    return torch.where(inside, score, most)


def expected_attention(p: Any, head: HeadView) -> Tensor:
    """Expected weights of normally distributed queries at the next positions."""
    inside = torch.tensor([position >= p.sinks for position in head.positions])
    weights = torch.zeros(len(head.positions), dtype=torch.float64)
    dim = head.keys.shape[1]
    places = [_next(head) + t for t in range(p.future) for _ in range(dim)]
    turned = turn(torch.eye(dim).double().repeat(p.future, 1), head.info, places)
    average = turned.unflatten(0, (p.future, dim)).mean(0).T
    for asked in head.asked().unbind(1):
        plain = turn(asked, head.info, [-t for t in range(len(asked))])[SKIPPED:]
        plain = plain if len(plain) else torch.zeros(1, dim, dtype=torch.float64)
        mean, spread = average @ plain.mean(0), average @ torch.cov(plain.T, correction=0) @ average.T
        logits = head.info.scale * (head.keys @ mean)
        if p.covariance:
            logits = logits + head.info.scale**2 * torch.stack([k @ spread @ k for k in head.keys]) / 2
        if bool(inside.any()):
            weights[inside] += torch.softmax(logits[inside], 0) / head.info.groups
    weights = (weights + p.epsilon) * head.values.norm(dim=-1) if p.value_norm else weights
    return _sinks(p, head, weights)


def trigonometric(p: Any, head: HeadView) -> Tensor:
    """Calibrated queries at growing distances."""
    if head.info.inv_freq is None:
        raise ValueError("the trace knows no rotary embedding")
    means, magnitudes = (_table(p, "query_frequencies", name, head) for name in ("mean", "magnitude"))
    half = len(head.info.inv_freq)
    plain = turn(head.keys, head.info, [-t for t in head.turned_to])
    first = slice(0, 2 * half, 2) if head.info.interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if head.info.interleaved else slice(half, 2 * half)
    keys = torch.complex(plain[:, first], plain[:, second])
    ahead = [2**n for n in range(p.reach.bit_length())]
    lines = []
    for mean, magnitude in zip(means, magnitudes, strict=True):
        query = torch.complex(mean[:, 0], mean[:, 1])
        line = []
        for key, at in zip(keys, head.turned_to, strict=True):
            angles = query.angle() - key.angle()
            distances = torch.tensor([_next(head) + d - at for d in ahead], dtype=torch.float64)[:, None]
            waves = torch.cos(distances * head.info.inv_freq.double() + angles)
            sums = (waves * query.abs() * key.abs()).sum(-1)
            hidden = ((magnitude - query.abs()).clamp(min=0) * key.abs()).sum()
            line.append((sums.max() if p.distances == "max" else sums.mean()) + hidden)
        scores = torch.stack(line)
        deviation = scores.std(correction=0)
        if p.standardise:
            scores = (scores - scores.mean()) / deviation if deviation > 0 else torch.zeros_like(scores)
        lines.append(scores)
    stacked = torch.stack(lines)
    return stacked.max(0).values if p.group == "max" else stacked.mean(0)


def leverage(p: Any, head: HeadView) -> Tensor:
    """Diagonal of the hat matrix of the keys without their rotary embedding."""
    inside = torch.tensor([position >= p.sinks for position in head.positions])
    x = turn(head.keys, head.info, [-t for t in head.turned_to])[inside]
    score = torch.zeros(len(head.positions), dtype=torch.float64)
    if len(x):
        x = x - x.mean(0)
        if p.sketch:
            x = x @ ops.gaussian_sketch(x.shape[1], p.sketch, p.seed, x.device).double()
        gram = x.T @ x
        ridge = 1e-7 * gram.trace() + 1e-30
        score[inside] = (x @ torch.linalg.inv(gram + ridge * torch.eye(len(gram)).double()) @ x.T).diagonal()
    return _sinks(p, head, score)


def non_causal(p: Any, head: HeadView) -> Tensor:
    """Attention within chunks of a prompt that was read in one pass, from which nothing has been evicted."""
    asked, count = head.asked(), len(head.positions)
    if count != len(asked):
        raise NotImplementedError("the oracle knows non_causal for the first compaction of a prompt only")
    received = torch.zeros(count, dtype=torch.float64)
    for first in range(p.sinks, count, p.chunk):
        part = slice(first, min(first + p.chunk, count))
        logits = torch.einsum("qgd,nd->gqn", asked[part], head.keys[part])
        logits = logits * head.info.scale if p.scaled else logits
        received[part] = torch.softmax(logits, -1).sum(1).mean(0)
    weighted = (received * head.values.norm(dim=-1)).tolist()
    before, behind = p.smooth // 2, (p.smooth - 1) // 2
    smoothed = [sum(weighted[max(n - before, p.sinks) : n + behind + 1]) / p.smooth for n in range(count)]
    return _sinks(p, head, torch.tensor(smoothed, dtype=torch.float64))


def learned_gate(p: Any, head: HeadView) -> Tensor:
    """What a gate says of each token, by itself; what a retention gate leaves of it, step by step."""
    table = tables.load_table(p.gate, "gates")
    every = HeadSpan.whole(head.info.heads)
    hidden = head.hidden()
    gate = {n: x.double() for n, x in table.of_layer(head.layer, every, hidden.shape[1], hidden.device).items()}
    said = []
    for read in hidden:
        x = read
        for weight, bias in (("hidden0_weight", "hidden0_bias"), ("hidden1_weight", "hidden1_bias")):
            if weight in gate:
                x = _ACTIVATIONS[table.notes["activation"]](gate[weight] @ x + gate[bias])
        said.append(float(gate["output_weight"][head.head] @ x + gate["output_bias"][head.head]))
    if table.notes["output"] == "score":
        return torch.tensor(said, dtype=torch.float64)
    kept = []
    for position, logit in zip(head.positions, said, strict=True):
        beta, age = 1 / (1 + math.exp(-logit)), head.seen + p.ahead - position
        kept.append(age * math.log(beta) + math.log(sum(beta**step for step in range(p.lookahead))))
    return torch.tensor(kept, dtype=torch.float64)


def _gelu(x: Tensor) -> Tensor:
    return torch.tensor([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()], dtype=torch.float64)


_ACTIVATIONS = {"silu": lambda x: x / (1 + torch.exp(-x)), "gelu": _gelu}


def negative(p: Any, head: HeadView) -> Tensor:
    """Minus the score of an importance scorer of this module."""
    return -scores.asked(IMPORTANCE[catalog().name_of(type(p.base))], p.base, head)


IMPORTANCE: dict[str, Scorer] = {
    "cur": cur,
    "expected_attention": expected_attention,
    "key_diff": key_diff,
    "lag_relative": lag_relative,
    "learned_gate": learned_gate,
    "leverage": leverage,
    "non_causal": non_causal,
    "q_filter": q_filter,
    "trigonometric": trigonometric,
}
REDUNDANCY: dict[str, Scorer] = {"negative": negative}
