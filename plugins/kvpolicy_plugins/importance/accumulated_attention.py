"""Attention that an entry has received so far (H2O)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from kvpolicy.contracts.components import ImportanceScorer, SlotState
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores, Weights

_STATE = "accumulated_attention"


class AccumulatedAttention(ImportanceScorer):
    """Sum of the attention weights of every query since the entry was written, over the query heads of its KV head.

    The sum is kept in fp32: in half precision a long running sum stops growing. Old entries have been seen by more
    queries than new ones, so a recent window has to be protected.
    """

    same_for_layers: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    paper: ClassVar[str] = "arXiv:2306.14048"
    comparable_across_heads: ClassVar[bool] = True

    def slot_state(self) -> tuple[SlotState, ...]:
        return (SlotState(_STATE),)

    def observe_attention(self, view: CacheView, weights: Weights) -> Mapping[str, Tensor]:
        return {_STATE: view.held(_STATE) + weights.sum(dim=(2, 3))}

    def score(self, view: CacheView) -> Scores:
        return view.held(_STATE).masked_fill(~view.valid, 0.0)
