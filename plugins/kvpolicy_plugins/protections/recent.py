"""The last tokens stay."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from kvpolicy.contracts.components import Protection
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Mask


class Recent(Protection):
    """Keeps the newest entries."""

    same_for_layers: ClassVar[bool] = True
    same_for_heads: ClassVar[bool] = True
    shorthand: ClassVar[str | None] = "count"

    count: int = Field(default=8, ge=0)
    """Entries from the end of the row."""

    def mask(self, view: CacheView) -> Mask:
        return view.newest(self.count)

    def reserved(self, prompt_length: int = 0) -> int:
        return self.count
