"""Asking a scorer, and looking at what it returns."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.contracts.components import Component, ImportanceScorer, RedundancyScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.errors import ScoreError
from kvpolicy.ops.dispatch import scratch
from kvpolicy.types import Scores


def once(scorer: ImportanceScorer | RedundancyScorer, view: CacheView) -> Scores:
    """Return the scorer's scores of a view, fp32 `[B, H, N]`, computed once while a policy scores that view.

    A scorer that is made of others asks them this way: one that is equal to the policy's importance costs nothing then.

    Raises:
        ScoreError: the scorer returned another shape or dtype.
    """
    # With its view, for somebody may change that on the way. Compared and not hashed: a field may be a list.
    kept = scratch()
    known: list[tuple[Component, CacheView, Scores]] = [] if kept is None else kept.setdefault("scores", [])
    for other, seen, scores in known:
        if seen is view and other == scorer:
            return scores
    made = checked(scorer.score(view), view, scorer)
    known.append((scorer, view, made))
    return made


def checked(scores: Tensor, view: CacheView, component: Component) -> Scores:
    """Return the scores; raises ScoreError, naming the component, unless they are fp32 `[B, H, N]`."""
    if not isinstance(scores, Tensor) or scores.shape != view.shape or scores.dtype != torch.float32:
        got = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ScoreError(
            f"{type(component).__name__}: returned {got} instead of torch.float32 {list(view.shape)}; "
            "return one fp32 number for every slot."
        )
    return scores
