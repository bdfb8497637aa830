"""A score that is given once, some tokens after an entry was written (KVpop's delayed scoring)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.contracts.components import ImportanceScorer, SlotState
from kvpolicy.contracts.view import CacheView
from kvpolicy.policy.scoring import once
from kvpolicy.types import Scores
from kvpolicy_plugins.importance.window_attention import WindowAttention

_STATE = "delayed"
_NEVER = float(torch.finfo(torch.float32).min)


class Delayed(ImportanceScorer):
    """What `base` says of an entry at the first compaction that finds it `delay` tokens old; it is not asked again.

    A judgement at once knows nothing of what an entry will be used for, one that is renewed forgets what it was used
    for. Younger entries score like the best of their head, and policies protect them anyway: ``recent`` as long as the
    delay.
    """

    same_for_layers: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2607.05061 (KVpop)"

    delay: int = Field(default=8, ge=0)
    """Tokens that come after an entry before it is scored."""
    base: ImportanceScorer = WindowAttention(group="mean", group_stage="weights", softmax_over="row")
    """The score that is given."""

    def slot_state(self) -> tuple[SlotState, ...]:
        return (SlotState(_STATE, fill=_NEVER),)

    def laws_excused(self) -> Mapping[str, str]:
        return self.base.laws_excused()

    def remember(self, view: CacheView) -> Mapping[str, Tensor]:
        given, judged = self._given(view)
        return {_STATE: torch.where(judged, given, _NEVER)}

    def score(self, view: CacheView) -> Scores:
        given, judged = self._given(view)
        best = given.masked_fill(~judged, _NEVER).amax(-1, keepdim=True) if view.shape[2] else given
        young = torch.where(judged.any(-1, keepdim=True), best, 0.0)
        return torch.where(view.valid, torch.where(judged, given, young), 0.0)

    def _given(self, view: CacheView) -> tuple[Scores, Tensor]:
        """Return the score of each entry, and which entries have one, bool `[B, H, N]`."""
        known = view.valid & (view.held(_STATE) > _NEVER)
        age = view.seen.to(device=view.device, dtype=torch.int64)[:, None, None] - 1 - view.positions
        return torch.where(known, view.held(_STATE), once(self.base, view)), known | (view.valid & (age >= self.delay))
