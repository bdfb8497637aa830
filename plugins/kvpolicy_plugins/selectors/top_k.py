"""The highest scores."""

from __future__ import annotations

from typing import ClassVar

from kvpolicy import ops
from kvpolicy.contracts.components import Selector, Slots
from kvpolicy.types import Counts, KeepIndices, Mask, Scores


class TopK(Selector):
    """Protected entries and then those with the highest scores; equal scores go to the older entry.

    With scope `layer` or `model` the scores arrive reduced, the same for all that share one set.
    """

    same_for_layers: ClassVar[bool] = True

    def select(self, scores: Scores, counts: Counts, protected: Mask, valid: Mask, slots: Slots) -> KeepIndices:
        return ops.top_k(scores, counts, protected, valid, width=slots.width)
