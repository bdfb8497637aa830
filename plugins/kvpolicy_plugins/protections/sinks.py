"""The first tokens stay (StreamingLLM's attention sinks)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from kvpolicy.contracts.components import Protection
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Mask


class Sinks(Protection):
    """Keeps the entries of the first tokens of the sequence."""

    same_for_layers: ClassVar[bool] = True
    same_for_heads: ClassVar[bool] = True
    shorthand: ClassVar[str | None] = "count"
    paper: ClassVar[str] = "arXiv:2309.17453"

    count: int = Field(default=4, ge=0)
    """Tokens from the start of the row, padding not counted."""

    def mask(self, view: CacheView) -> Mask:
        return view.valid & (view.positions < self.count)

    def reserved(self, prompt_length: int = 0) -> int:
        return self.count
