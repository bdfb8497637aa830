"""What the output loses with an entry (CAOTE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.policy.scoring import once
from kvpolicy.types import Scores
from kvpolicy_plugins.importance.accumulated_attention import AccumulatedAttention

_TINY = 1e-30
_WHOLE = 1e-6  # what is left beside an entry that has nearly all of the attention


class OutputError(ImportanceScorer):
    """``a / (1 - a) * |o - v|_2``: how far the output moves when one entry goes and the others share its part.

    `a` is the base score as a share of the sum over the head, `o` the mean of the values weighted with it. Meant for
    scores that are not negative; others are counted from the lowest of their head. O(N D).
    """

    shorthand: ClassVar[str | None] = "base"
    same_for_layers: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2504.14051 (CAOTE)"

    base: ImportanceScorer = AccumulatedAttention()
    """The score that stands for attention weights."""
    output: Literal["weighted", "mean"] = "weighted"
    """What the output is before anything goes: `weighted`, or the plain `mean` of the values (FastCAOTE)."""

    def laws_excused(self) -> Mapping[str, str]:
        return self.base.laws_excused()

    def score(self, view: CacheView) -> Scores:
        held = view.valid.unsqueeze(-1)
        values = torch.where(held, view.values, 0).float()
        scores = torch.where(view.valid, ops.from_lowest(once(self.base, view), view.valid), 0.0)
        share = scores / scores.sum(-1, keepdim=True).clamp(min=_TINY)
        if self.output == "weighted":
            output = (share.unsqueeze(2) @ values).squeeze(2)
        else:
            output = values.sum(2) / held.sum(2).clamp(min=1)
        distance = torch.linalg.vector_norm(output.unsqueeze(2) - values, dim=-1)
        return torch.where(view.valid, share / (1 - share).clamp(min=_WHOLE) * distance, 0.0)
