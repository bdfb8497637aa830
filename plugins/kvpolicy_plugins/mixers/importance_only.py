"""Importance alone."""

from __future__ import annotations

from typing import ClassVar

from kvpolicy.contracts.components import Mixer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores


class ImportanceOnly(Mixer):
    """The importance as it is; the redundancy is not even computed."""

    same_for_layers: ClassVar[bool] = True
    uses_redundancy: ClassVar[bool] = False

    def mix(self, importance: Scores, redundancy: Scores, view: CacheView) -> Scores:
        return importance
