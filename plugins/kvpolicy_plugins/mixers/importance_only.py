"""Importance alone."""

from __future__ import annotations

from typing import ClassVar

from kvpolicy.components import Mixer
from kvpolicy.types import Scores
from kvpolicy.view import CacheView


class ImportanceOnly(Mixer):
    """The importance as it is; the redundancy is not even computed."""

    same_for_layers: ClassVar[bool] = True
    uses_redundancy: ClassVar[bool] = False

    def mix(self, importance: Scores, redundancy: Scores, view: CacheView) -> Scores:
        return importance
