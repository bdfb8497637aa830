"""Attention times what the value does to the output (CriticalKV)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView, lacking
from kvpolicy.policy.scoring import once
from kvpolicy.types import Scores
from kvpolicy_plugins.importance.window_attention import WindowAttention


class Critical(ImportanceScorer):
    """Two stages: the best of the base score first, then the others by ``(s + epsilon) * |W_o v|_1``.

    The first stage takes ``first_share`` of the budget, rounded down. The norm is the mean over the query heads that
    share the value. The numbers only rank: 2 and more for stage one, shares of the head's best for stage two. The
    formula is meant for scores that are not negative; others are counted from the lowest of their head. Where layers
    have budgets of their own, the first stage is still a share of the average one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    paper: ClassVar[str] = "arXiv:2502.03805"
    laws_not_applicable: ClassVar[Mapping[str, str]] = {
        "permuting_entries": "of equal scores at the cut between the stages the older entry goes in"
    }

    base: ImportanceScorer = WindowAttention(group="mean", group_stage="weights", softmax_over="row")
    """The score that is refined; SnapKV's by default."""
    first_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the budget that the base score decides alone."""
    epsilon: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    """Added to the score, so that an entry without attention is still ranked by its value."""

    def score(self, view: CacheView) -> Scores:
        projection = view.extras.get("output_projection")
        if projection is None or view.budget is None:
            no_weights = ("the output projection", "`extras` with `output_projection`")
            no_budget = ("the budget of a compaction", "`budget`")
            raise lacking("importance: critical", *(no_weights if projection is None else no_budget))
        base = once(self.base, view)
        norm = ops.projected_value_norm(view.values, projection, view.valid)
        refined = (ops.from_lowest(base, view.valid) + self.epsilon) * norm
        held = view.valid.sum(-1)
        share = (view.budget.to(view.device) * self.first_share).floor().to(torch.int64)
        counts = torch.minimum(share[:, None], held)
        slots = view.shape[2]
        first = ops.top_k(base, counts, torch.zeros_like(view.valid), view.valid, width=slots).mask(slots)
        # Nothing of stage two is above 1, nothing of stage one below 2.
        rest = ops.by_maximum(refined, view.valid & ~first)
        return torch.where(first, 2.0 + ops.ranks(base, view.valid), rest)
