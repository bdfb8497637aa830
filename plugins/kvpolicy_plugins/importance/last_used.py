"""When an entry was last attended to (RaaS)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer, SlotState
from kvpolicy.contracts.view import CacheView, lacking
from kvpolicy.types import Scores, Weights

_STATE = "last_used"


class LastUsed(ImportanceScorer):
    """The last step at which the entry's attention was among the upper `share` of what the query could see.

    An entry is stamped with its own position when it is written; the oldest stamp goes first. The weights of a KV
    head's query heads are reduced to their maximum. Costs a sort of each row of weights.
    """

    shorthand: ClassVar[str | None] = "share"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    paper: ClassVar[str] = "arXiv:2502.11147"
    comparable_across_heads: ClassVar[bool] = True
    comparable_across_layers: ClassVar[bool] = True
    rounded: ClassVar[bool] = False
    laws_not_applicable: ClassVar[Mapping[str, str]] = {
        "permuting_entries": "an entry that was never used dates from its position"
    }

    share: float = Field(default=0.5, gt=0, le=1)
    """Share of the visible entries that a query stamps, rounded up; at the edge, weights that are equal but for
    rounding are stamped too."""

    def slot_state(self) -> tuple[SlotState, ...]:
        return (SlotState(_STATE, torch.int32, fill=-1),)

    def observe_attention(self, view: CacheView, weights: Weights) -> Mapping[str, Tensor]:
        if view.query_positions is None or view.query_valid is None:
            raise lacking(
                "importance: last_used",
                "the positions of the queries that it observes",
                "`query_positions` and `query_valid`",
            )
        step = view.query_positions[:, None, :, None]
        visible = (view.positions.unsqueeze(2) <= step) & view.valid.unsqueeze(2) & view.query_valid[:, None, :, None]
        row = torch.where(visible, weights.amax(2), -1.0)
        count = (visible.sum(-1, keepdim=True).double() * self.share - 1e-9).ceil().to(torch.int64)
        edge = row.sort(-1, descending=True).values.gather(-1, (count - 1).clamp(min=0))
        stamps = torch.where(visible & (row >= edge * (1 - ops.ROUNDING)), step, -1).amax(2)
        return {_STATE: torch.maximum(view.held(_STATE), stamps)}

    def score(self, view: CacheView) -> Scores:
        return torch.where(view.valid, torch.maximum(view.held(_STATE), view.positions), 0).float()
