"""Entries one after the other, each unlike those before it (alpha)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.policy.scoring import once
from kvpolicy.types import Scores
from kvpolicy_plugins.importance.window_attention import WindowAttention

_TINY = 1e-15


class GreedyValues(ImportanceScorer):
    """The turn in which a greedy choice takes an entry: by its base score, less what is like it among those taken.

    Each turn takes the `step` entries with the highest ``s - weight * max_j cos(v, v_j)`` over the entries `j` taken in
    earlier turns, where `s` is the base score on a scale from 0 to 1 in its head. Of equal ones the older goes first.
    The first `k` are the greedy choice of `k` entries for every `k`, so nothing has to be known of the budget. O(N^2 D)
    operations, O(N) memory.
    """

    same_for_layers: ClassVar[bool] = True
    shorthand: ClassVar[str | None] = "base"
    rounded: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2605.14292"
    laws_not_applicable: ClassVar[Mapping[str, str]] = {
        "permuting_entries": "of equal entries the older one is taken first"
    }

    base: ImportanceScorer = WindowAttention()
    """The score that the greedy choice begins with."""
    weight: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    """How much likeness to a taken entry costs, on the scale of the base score."""
    step: int = Field(default=16, ge=1)
    """Entries that a turn takes at once; 1 is the greedy choice itself, and as many turns as there are entries."""

    def score(self, view: CacheView) -> Scores:
        plain = ops.min_max(once(self.base, view), view.valid)
        values = torch.where(view.valid.unsqueeze(-1), view.values, 0).float()
        unit = values / torch.linalg.vector_norm(values, dim=-1, keepdim=True).clamp_(min=_TINY)
        left = view.valid.clone()
        likeness = torch.zeros_like(plain)
        turns = torch.zeros_like(plain)
        count = view.shape[2]
        step = min(self.step, max(count, 1))
        for first in range(0, count, step):
            worth = ops.levelled(plain - self.weight * likeness, left)
            order = ops.ordered_by(left, worth)[..., :step]
            turn = torch.arange(first, first + order.shape[-1], device=view.device).expand(order.shape)
            # Behind the last entry that is left come others, whose turn is known.
            turns.scatter_(-1, order, torch.where(left.gather(-1, order), turn.float(), turns.gather(-1, order)))
            taken = unit.gather(2, order.unsqueeze(-1).expand(*order.shape, unit.shape[-1]))
            near = (unit @ taken.transpose(-1, -2)).amax(-1)
            likeness = near if first == 0 else torch.maximum(likeness, near)
            left.scatter_(-1, order, False)
        # A turn would hide that there is no number.
        known = plain.isfinite() & unit.isfinite().all(-1)
        return torch.where(view.valid, view.valid.sum(-1, keepdim=True) - turns, 0.0).masked_fill(
            view.valid & ~known, float("nan")
        )
