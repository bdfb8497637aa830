"""The bundled components once more, one KV head at a time, dense and in float64, with loops.

Nothing here uses `kvpolicy.ops` except the counter-based random number, which is its own definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.loading.installed import catalog
from kvsupport.events import LayerInfo


@dataclass
class HeadView:
    """What one KV head of one row holds, in order of position.

    Attributes:
        positions: original positions.
        keys: float64 `[n, D]`, as cached (turned to their present rotary positions).
        values: float64 `[n, Dv]`.
        turned_to: the rotary position of each key.
        queries: float64 `[t, G, D]`, the row's last `t` queries, turned as the keys are.
        query_positions: their original positions.
        hidden: what the layer's attention read of each entry's token, float64 `[n, E]`.
        asked: all queries of the row, float64 `[seen, G, D]`, as the model made them.
        history: the attention of every query since the last compaction: its position and float64 `[G, n]`.
        memory: what a scorer remembered of each entry at the last compaction, by its name: by position.
        info: facts of the layer.
        layer, head: which head this is.
        sinks: `[G]` sink logits or None.
        compactions: how many the row has had.
        seen: tokens that the row has seen.
        budget: entries that the compaction keeps.
    """

    positions: list[int]
    keys: Tensor
    values: Tensor
    turned_to: list[int]
    queries: Tensor
    query_positions: list[int]
    hidden: Callable[[], Tensor]
    asked: Callable[[], Tensor]
    history: Callable[[], list[tuple[int, Tensor]]]
    memory: dict[str, dict[int, float]]
    info: LayerInfo
    layer: int
    head: int
    sinks: Tensor | None
    compactions: int
    seen: int
    budget: int

    def remembered(self, name: str, otherwise: float | list[int]) -> list[float]:
        """Return what is remembered of each entry, or what stands for an entry that is new."""
        known = self.memory.get(name, {})
        new = otherwise if isinstance(otherwise, list) else [otherwise] * len(self.positions)
        return [known.get(position, start) for position, start in zip(self.positions, new, strict=True)]


Scorer = Callable[[Any, HeadView], Tensor]
"""(parameters, head) -> float64 `[n]`."""
Mixer = Callable[[Any, Tensor, Tensor, HeadView], Tensor]
"""(parameters, importance `[n]`, redundancy `[n]`, head) -> float64 `[n]`."""


def turn(vectors: Tensor, info: LayerInfo, by: list[int]) -> Tensor:
    """Turn float64 vectors `[n, D]` by so many positions each."""
    if not any(by):
        return vectors
    if info.inv_freq is None:
        raise ValueError("the trace knows no rotary embedding")
    half = info.inv_freq.numel()
    angle = torch.tensor(by, dtype=torch.float64)[:, None] * info.inv_freq.double()
    first = slice(0, 2 * half, 2) if info.interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if info.interleaved else slice(half, 2 * half)
    a, b = vectors[:, first], vectors[:, second]
    result = vectors.clone()
    result[:, first] = a * angle.cos() - b * angle.sin()
    result[:, second] = b * angle.cos() + a * angle.sin()
    return result


def logits_of(query: Tensor, keys: Tensor, info: LayerInfo) -> Tensor:
    """Scaled, soft-capped logits of queries `[..., D]` over keys `[n, D]`."""
    logits = query @ keys.T * info.scale
    return logits if info.softcap is None else info.softcap * torch.tanh(logits / info.softcap)


def softmax_among(logits: Tensor, chosen: list[bool], sink: float | None) -> Tensor:
    """Softmax of `[n]` logits among the chosen ones, 0 elsewhere; a sink logit joins the denominator."""
    mask = torch.tensor(chosen)
    if not bool(mask.any()):
        return torch.zeros_like(logits)
    inside = logits[mask] if sink is None else torch.cat([logits[mask], torch.tensor([sink], dtype=logits.dtype)])
    result = torch.zeros_like(logits)
    result[mask] = torch.softmax(inside, 0)[: int(mask.sum())]
    return result


def window_attention(p: Any, head: HeadView) -> Tensor:
    """What the last `observe` queries attend to."""
    queries, at = head.queries[-p.observe :], head.query_positions[-p.observe :]
    candidate = [position < at[0] for position in head.positions]
    rows = []
    for query, position in zip(queries, at, strict=True):
        visible = candidate if p.softmax_over == "candidates" else [place <= position for place in head.positions]
        logits = logits_of(query, head.keys, head.info)  # [G, n]
        sinks = [None] * len(logits) if head.sinks is None else head.sinks.tolist()
        if p.group_stage == "logits":
            sink = None if head.sinks is None else float(_over(p.group, head.sinks[:, None])[0])
            row = softmax_among(_over(p.group, logits), visible, sink)
        else:
            each = [softmax_among(line, visible, sink) for line, sink in zip(logits, sinks, strict=True)]
            row = _over(p.group, torch.stack(each))
        row = torch.where(torch.tensor(candidate), row, 0.0)
        rows.append(smooth(row, candidate, p.smooth, p.smooth_kind) if p.smooth_stage == "query" else row)
    score = torch.stack(rows).mean(0)
    if p.smooth_stage == "mean":
        score = smooth(score, candidate, p.smooth, p.smooth_kind)
    best = max((float(s) for s, c in zip(score, candidate, strict=True) if c), default=0.0)
    return torch.tensor([float(s) if c else best for s, c in zip(score, candidate, strict=True)], dtype=torch.float64)


def _over(how: str, tensor: Tensor) -> Tensor:
    return tensor.max(0).values if how == "max" else tensor.mean(0)


def smooth(row: Tensor, candidate: list[bool], size: int, kind: str) -> Tensor:
    """Pool `[n]` scores over neighbouring candidates; 0 elsewhere."""
    where = [i for i, yes in enumerate(candidate) if yes]
    result = torch.zeros_like(row)
    for rank, slot in enumerate(where):
        inside = where[max(rank - size // 2, 0) : rank + (size - 1) // 2 + 1]
        values = [float(row[i]) for i in inside]
        if kind == "max":
            result[slot] = max(values)
        else:
            result[slot] = sum(values) / (len(values) if kind == "mean" else size)
    return result


def key_norm(p: Any, head: HeadView) -> Tensor:
    """Minus the norm of the key."""
    return -head.keys.pow(2).sum(-1).sqrt()


def value_norm(p: Any, head: HeadView) -> Tensor:
    """The norm of the value."""
    return head.values.pow(2).sum(-1).sqrt()


def random(p: Any, head: HeadView) -> Tensor:
    """The counter-based random number."""
    drawn = ops.counter_uniform(
        p.seed, head.layer, torch.tensor(head.head), torch.tensor(head.positions), torch.tensor(head.compactions)
    )
    return drawn.double()


def recency(p: Any, head: HeadView) -> Tensor:
    """The position."""
    return torch.tensor(head.positions, dtype=torch.float64)


def nothing(p: Any, head: HeadView) -> Tensor:
    """Zero."""
    return torch.zeros(len(head.positions), dtype=torch.float64)


def cosines(p: Any, head: HeadView) -> Tensor:
    """All cosines `[m, m]` of the entries that take part in `key_cosine`, the diagonal 0."""
    count = max(len(head.positions) - p.window, 0)
    keys = head.keys[:count]
    if p.rope == "pre":
        keys = turn(keys, head.info, [-place for place in head.turned_to[:count]])
    unit = keys / keys.pow(2).sum(-1, keepdim=True).sqrt().clamp(min=1e-15)
    return unit @ unit.T * (1 - torch.eye(count, dtype=torch.float64))


def key_cosine(p: Any, head: HeadView) -> Tensor:
    """Softmax of the mean cosine, each key's newest twins exempted."""
    similarity = cosines(p, head)
    count = len(similarity)
    result = torch.zeros(len(head.positions), dtype=torch.float64)
    if count == 0:
        return result
    left = similarity.clone()
    for i in range(count):
        similar = (similarity[i] > p.threshold).nonzero()[:, 0].tolist()  # never i, for the diagonal is 0
        if p.index_zero and not similar:
            similar = [0]
        for j in similar[-p.beta :] if p.beta else []:
            left[i, j] = 0.0
    # Rows pick. The mean over the pickers spares the newest twin, the mean over a row spares the picker itself.
    mean = left.sum(0 if p.spare == "newest" else 1) / count
    result[:count] = torch.softmax(mean, 0)
    return result


def key_density(p: Any, head: HeadView) -> Tensor:
    """Mean of a kernel over the distances to all other keys."""
    return density(p, head, lambda i, j: 1.0)


def density(p: Any, head: HeadView, weight: Callable[[int, int], float]) -> Tensor:
    """The same, with the weight that key `j` has for key `i`."""
    keys = turn(head.keys, head.info, [-place for place in head.turned_to]) if p.rope == "pre" else head.keys
    unit = [key / key.norm() if float(key.norm()) else key for key in keys]
    result = torch.zeros(len(unit), dtype=torch.float64)
    for i, one in enumerate(unit):
        others = [weight(i, j) * ((one @ other - 1) / p.bandwidth).exp() for j, other in enumerate(unit) if j != i]
        result[i] = sum(others) / len(unit)
    return result


def asked(scorer: Scorer, component: Any, head: HeadView) -> Tensor:
    """The scores of a component as a policy takes them, float64 `[n]`."""
    made = scorer(component, head)
    return levelled(made) if component.rounded else made


def levelled(result: Tensor) -> Tensor:
    """Scores `[n]` that differ by no more than rounding are made equal: runs of near ones, cut where they are long."""
    level = result.clone()
    run: list[int] = []
    for i in [*result.argsort().tolist(), None]:
        if run and i is not None and near(float(result[run[-1]]), float(result[i])):
            run.append(i)
            continue
        for before, n in pairwise(run):
            low, high = float(result[before]), float(result[n])
            whole = near(float(result[run[0]]), float(result[run[-1]])) or _cell(low) == _cell(high)
            level[n] = level[before] if whole else result[n]
        run = [] if i is None else [i]
    return level


def near(low: float, high: float) -> bool:
    """Say whether two scores differ by no more than rounding."""
    return abs(high - low) <= ops.ROUNDING * max(abs(low), abs(high))


def _cell(score: float) -> tuple[float, int, int]:
    """Sign, binade, and which part of it, of 2^18 equal ones; a part is the largest power of two within rounding."""
    share, binade = math.frexp(abs(score))
    return math.copysign(1.0, score), binade, math.floor((2 * share - 1) * 2**18)


def mean_key(p: Any, head: HeadView) -> Tensor:
    """Mean cosine to all keys, or the cosine with the mean direction."""
    unit = _directions(head)
    mean = unit.mean(0)
    if p.unit_mean:
        mean = mean / mean.pow(2).sum().sqrt().clamp(min=1e-12)
    return unit @ mean


def _directions(head: HeadView) -> Tensor:
    return head.keys / head.keys.pow(2).sum(-1, keepdim=True).sqrt().clamp(min=1e-15)


def linear(p: Any, importance: Tensor, redundancy: Tensor, head: HeadView) -> Tensor:
    """Weighted difference."""
    share = float(p.weight)
    return share * importance - (1 - share) * redundancy


def max_normalised(p: Any, importance: Tensor, redundancy: Tensor, head: HeadView) -> Tensor:
    """Weighted difference of shares of the largest magnitude."""
    first, second = (x / x.abs().max() if float(x.abs().max()) else x for x in (importance, redundancy))
    return linear(p, first, second, head)


def z_score(p: Any, importance: Tensor, redundancy: Tensor, head: HeadView) -> Tensor:
    """Weighted difference of standard scores."""
    first, second = (x - x.mean() for x in (importance, redundancy))
    first, second = (x / x.pow(2).mean().sqrt() if float(x.abs().max()) > 1e-12 else 0 * x for x in (first, second))
    return linear(p, first, second, head)


def rank(p: Any, importance: Tensor, redundancy: Tensor, head: HeadView) -> Tensor:
    """Weighted difference of ranks, equal scores in the middle of their places."""

    def places(x: Tensor) -> Tensor:
        lower, upper = (x[:, None] > x).sum(1), (x[:, None] >= x).sum(1)
        return (lower + upper - 1).double() / 2

    return linear(p, places(importance), places(redundancy), head) / max(len(importance) - 1, 1)


def head_adaptive(p: Any, importance: Tensor, redundancy: Tensor, head: HeadView) -> Tensor:
    """Importance where keys differ, diversity where they are alike."""
    if p.by_modality:
        raise NotImplementedError("the oracle does not know which tokens are images")
    count = len(importance)
    counted = max(count - p.window, 0)
    unit = _directions(head)
    pairs = [float(unit[i] @ unit[j]) for i in range(count) for j in range(count) if i != j]
    r = max(sum(pairs) / max(len(pairs), 1), 0.0)

    def stretched(x: Tensor) -> Tensor:
        inside = x[:counted]
        if counted == 0 or float(inside.max()) == float(inside.min()):
            return torch.zeros_like(x)
        share = (x - inside.min()) / (inside.max() - inside.min())
        return share * importance[:counted].abs().mean() / share[:counted].mean()

    intrinsic = asked(IMPORTANCE[catalog().name_of(type(p.intrinsic))], p.intrinsic, head)
    return (1 - r) * (importance + stretched(intrinsic)) + r * stretched(-redundancy)


def importance_only(p: Any, importance: Tensor, redundancy: Tensor, head: HeadView) -> Tensor:
    """The importance."""
    return importance


IMPORTANCE: dict[str, Scorer] = {
    "window_attention": window_attention,
    "key_norm": key_norm,
    "value_norm": value_norm,
    "random": random,
    "recency": recency,
    "none": nothing,
}
REDUNDANCY: dict[str, Scorer] = {
    "key_cosine": key_cosine,
    "key_density": key_density,
    "mean_key": mean_key,
    "none": nothing,
}
MIXERS: dict[str, Mixer] = {
    "head_adaptive": head_adaptive,
    "importance_only": importance_only,
    "linear": linear,
    "max_normalised": max_normalised,
    "rank": rank,
    "z_score": z_score,
}
