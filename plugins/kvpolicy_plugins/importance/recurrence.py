"""Entries that come back (LazyEviction)."""

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

_LAST, _INTERVAL = "recurrence_last", "recurrence_interval"


class Recurrence(ImportanceScorer):
    """``2 s(-(t - TS) / MRI) + 2 s(-1 / MRI)`` with the sigmoid `s`; the second term is 0 while MRI is 0.

    An entry is *active* when a query head gives it more than `threshold`. TS is its last active step (at first its own
    position), MRI the longest pause between two active steps, `t` the last step. An entry that has not been active
    since it was written scores 0; the newest one, written at `t`, scores 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    paper: ClassVar[str] = "arXiv:2506.15969"
    comparable_across_heads: ClassVar[bool] = True
    laws_not_applicable: ClassVar[Mapping[str, str]] = {
        "permuting_entries": "an entry that was never active dates from its position"
    }

    threshold: float = Field(default=1e-4, ge=0, le=1)
    """Attention weight above which an entry counts as active; one above it by no more than rounding is not."""

    def slot_state(self) -> tuple[SlotState, ...]:
        return (SlotState(_LAST, torch.int32, fill=-1), SlotState(_INTERVAL, torch.int32))

    def observe_attention(self, view: CacheView, weights: Weights) -> Mapping[str, Tensor]:
        if view.query_positions is None:
            raise lacking(
                "importance: recurrence", "the positions of the queries that it observes", "`query_positions`"
            )
        active = weights.amax(2) > self.threshold * (1 + ops.ROUNDING)
        step = view.query_positions[:, None, :, None].expand(active.shape)
        last = torch.where(active, step, -1).cummax(2).values
        start = self._last(view).unsqueeze(2)
        before = torch.maximum(torch.cat([start, last[:, :, :-1]], 2), start)
        pause = torch.where(active, step - before, 0).amax(2)
        return {
            _LAST: torch.maximum(last[:, :, -1], start.squeeze(2)),
            _INTERVAL: torch.maximum(view.held(_INTERVAL), pause),
        }

    def score(self, view: CacheView) -> Scores:
        now = (view.seen - 1).to(view.device)[:, None, None]
        idle = torch.where(view.valid, now - self._last(view), 0).clamp(min=0).float()
        interval = torch.where(view.valid, view.held(_INTERVAL), 0).float()
        recurs = interval > 0
        share = torch.where(recurs, idle / interval.clamp(min=1), torch.where(idle > 0, float("inf"), 0.0))
        second = torch.where(recurs, torch.sigmoid(-1 / interval.clamp(min=1)), 0.0)
        return 2 * (torch.sigmoid(-share) + second)

    @staticmethod
    def _last(view: CacheView) -> Tensor:
        return torch.maximum(view.held(_LAST), view.positions)
