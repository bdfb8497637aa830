"""Scorers of the oracle that follow the attention of every query, or are made of others; plain loops, float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.loading.installed import catalog
from kvsupport import oracle_scores as scores
from kvsupport import oracle_statistics as statistics
from kvsupport.oracle_scores import HeadView, Scorer

Remember = Callable[[Any, HeadView], dict[str, Sequence[float | None]]]
"""(parameters, head) -> what is kept of each entry, by name; None for nothing."""


def base_of(component: Any, head: HeadView) -> Tensor:
    known = {**scores.IMPORTANCE, **IMPORTANCE, **statistics.IMPORTANCE}
    return scores.asked(known[catalog().name_of(type(component))], component, head)


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([0.0 if value is None else value for value in values], dtype=torch.float64)


def tova(p: Any, head: HeadView) -> Tensor:
    """The weights of the newest query, mean over its group."""
    visible = [True] * len(head.positions)
    sinks = [None] * head.info.groups if head.sinks is None else head.sinks.tolist()
    lines = zip(scores.logits_of(head.queries[-1], head.keys, head.info), sinks, strict=True)
    return torch.stack([scores.softmax_among(line, visible, sink) for line, sink in lines]).mean(0)


def accumulated(p: Any, head: HeadView) -> dict[str, Sequence[float | None]]:
    """Attention received since an entry was written, faded by `decay` with each query where there is one."""
    total = head.remembered("accumulated", 0.0)
    for _, weights in head.history():
        total = [getattr(p, "decay", 1.0) * old + new for old, new in zip(total, weights.sum(0).tolist(), strict=True)]
    return {"accumulated": total}


def stamps(p: Any, head: HeadView) -> dict[str, Sequence[float | None]]:
    """The last step at which an entry was among the upper share."""
    last = head.remembered("stamps", head.positions)
    for step, weights in head.history():
        best = {n: float(weights[:, n].max()) for n, position in enumerate(head.positions) if position <= step}
        count = math.ceil(p.share * len(best) - 1e-9)
        edge = sorted(best.values(), reverse=True)[count - 1] * (1 - ops.ROUNDING)
        last = [float(step) if best.get(n, -1.0) >= edge else old for n, old in enumerate(last)]
    return {"stamps": last}


def pauses(p: Any, head: HeadView) -> dict[str, Sequence[float | None]]:
    """The last active step of each entry, and its longest pause between two."""
    last, longest = head.remembered("active", head.positions), head.remembered("pause", 0.0)
    for step, weights in head.history():
        for n in range(len(last)):
            if float(weights[:, n].max()) > p.threshold * (1 + ops.ROUNDING):
                longest[n] = max(longest[n], step - last[n])
                last[n] = float(step)
    return {"active": last, "pause": longest}


def recurrence(p: Any, head: HeadView) -> Tensor:
    """How likely an entry comes back, by its longest pause."""
    found = pauses(p, head)
    result = []
    for last, pause in zip(_tensor(found["active"]).tolist(), _tensor(found["pause"]).tolist(), strict=True):
        idle = head.seen - 1 - last
        if pause:
            result.append(2 / (1 + math.exp(min(idle / pause, 700.0))) + 2 / (1 + math.exp(1 / pause)))
        else:
            result.append(0.0 if idle else 1.0)
    return _tensor(result)


def faded(p: Any, head: HeadView) -> dict[str, Sequence[float | None]]:
    """Shares of the best score of the moment, together with the past; nothing for the newest entries."""
    older = len(head.positions) - p.window
    return {"faded": [value if n < older else None for n, value in enumerate(_combined(p, head))]}


def _combined(p: Any, head: HeadView) -> list[float]:
    now = base_of(p.base, head)
    best = float(now.abs().max()) or 1.0
    result = []
    for old, new in zip(head.remembered("faded", -1.0), (now / best).tolist(), strict=True):
        if old < 0:
            result.append(new)
        elif p.combine == "max":
            result.append(max(p.decay * old, new))
        else:
            result.append(p.decay * old + (new if p.combine == "sum" else (1 - p.decay) * new))
    return result


def attention_memory(p: Any, head: HeadView) -> Tensor:
    """The same, smoothed over older entries."""
    combined = _tensor(_combined(p, head))
    older = [n < len(head.positions) - p.window for n in range(len(head.positions))]
    return torch.where(torch.tensor(older), scores.smooth(combined, older, p.smooth, "max"), combined)


def given(p: Any, head: HeadView) -> dict[str, Sequence[float | None]]:
    """The score that each entry has been given once and for all; None for those that are too young."""
    now = base_of(p.base, head).tolist()
    found: list[float | None] = []
    for position, old, new in zip(head.positions, head.remembered("given", math.inf), now, strict=True):
        late = head.seen - 1 - position >= p.delay
        found.append(old if old != math.inf else new if late else None)
    return {"given": found}


def delayed(p: Any, head: HeadView) -> Tensor:
    """The same, and the best of them for those that are too young."""
    found = given(p, head)["given"]
    best = max((value for value in found if value is not None), default=0.0)
    return _tensor([best if value is None else value for value in found])


def critical(p: Any, head: HeadView) -> Tensor:
    """The best of the base score first, then by what the values do to the output."""
    if head.info.output_projection is None:
        raise ValueError("the trace knows no output projection")
    base = base_of(p.base, head)
    outputs = torch.einsum("nd,gdm->ngm", head.values, head.info.output_projection[head.head].double())
    refined = (base - min(float(base.min()), 0.0) + p.epsilon) * outputs.abs().sum(-1).mean(1)
    order = sorted(range(len(base)), key=lambda n: (-float(base[n]), n))
    first = order[: math.floor(p.first_share * head.budget)]
    rest = [float(refined[n]) for n in range(len(base)) if n not in first]
    most = max(rest, default=0.0) or 1.0
    lower = [int((base < base[n]).sum()) for n in range(len(base))]
    return _tensor([2.0 + lower[n] if n in first else float(refined[n]) / most for n in range(len(base))])


def value_weighted(p: Any, head: HeadView) -> Tensor:
    """The base, counted from its lowest where that is negative, times the length of the value."""
    base = base_of(p.base, head)
    weighted: Tensor = (base - min(float(base.min()), 0.0)) * head.values.norm(p.norm, dim=-1)
    return weighted


def key_coverage(p: Any, head: HeadView) -> Tensor:
    """The density of keys, where those that matter more count whole."""
    matters = base_of(p.by, head).tolist()
    return scores.density(p, head, lambda i, j: 1.0 if (matters[j], j) > (matters[i], i) else p.lower)


IMPORTANCE: dict[str, Scorer] = {
    "accumulated_attention": lambda p, head: _tensor(accumulated(p, head)["accumulated"]),
    "attention_memory": attention_memory,
    "critical": critical,
    "delayed": delayed,
    "decayed_attention": lambda p, head: _tensor(accumulated(p, head)["accumulated"]),
    "last_used": lambda p, head: _tensor(stamps(p, head)["stamps"]),
    "recurrence": recurrence,
    "tova": tova,
    "value_weighted": value_weighted,
}
REDUNDANCY: dict[str, Scorer] = {"key_coverage": key_coverage}
REMEMBER: dict[str, Remember] = {
    "accumulated_attention": accumulated,
    "attention_memory": faded,
    "decayed_attention": accumulated,
    "delayed": given,
    "last_used": stamps,
    "recurrence": pauses,
}
"""What is remembered at a compaction, for the scorers with memory."""
