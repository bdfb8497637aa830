"""Attention that an entry has received lately (Scissorhands)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.contracts.components import ImportanceScorer, SlotState
from kvpolicy.contracts.view import CacheView, lacking
from kvpolicy.types import Scores, Weights

_STATE = "decayed_attention"


class DecayedAttention(ImportanceScorer):
    """``imp <- decay * imp + w`` for every query, with its weights `w` summed over the query heads of the KV head.

    The decay is per query, not per block or forward pass, so a prompt in chunks scores like a prompt at once. With
    ``decay: 1`` it is H2O's sum.
    """

    shorthand: ClassVar[str | None] = "decay"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    paper: ClassVar[str] = "arXiv:2305.17118"
    comparable_across_heads: ClassVar[bool] = True

    decay: float = Field(default=0.9975, ge=0, le=1)
    """What is left of the past after each query; 1 - 1/400 remembers about 400 queries, the paper's history window."""

    def slot_state(self) -> tuple[SlotState, ...]:
        return (SlotState(_STATE),)

    def observe_attention(self, view: CacheView, weights: Weights) -> Mapping[str, Tensor]:
        if view.query_valid is None:
            raise lacking(
                "importance: decayed_attention", "the padding of the queries that it observes", "`query_valid`"
            )
        valid = view.query_valid
        later = valid.sum(-1, keepdim=True) - valid.cumsum(-1)
        factor = torch.pow(self.decay, later.float()).masked_fill(~valid, 0.0)
        new = torch.einsum("bhgqn,bq->bhn", weights, factor)
        left = torch.pow(self.decay, valid.sum(-1).float())[:, None, None]
        return {_STATE: view.held(_STATE) * left + new}

    def score(self, view: CacheView) -> Scores:
        return view.held(_STATE).masked_fill(~view.valid, 0.0)
