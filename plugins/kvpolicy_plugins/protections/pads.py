"""Padding goes."""

from __future__ import annotations

from typing import ClassVar, Literal

from kvpolicy.contracts.components import Protection
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Mask


class Pads(Protection):
    """Drops every slot that holds no token. Each policy does so anyway; here it can be said."""

    same_for_layers: ClassVar[bool] = True
    same_for_heads: ClassVar[bool] = True
    effect: ClassVar[Literal["keep", "drop"]] = "drop"
    only_padding: ClassVar[bool] = True

    def mask(self, view: CacheView) -> Mask:
        return ~view.valid
