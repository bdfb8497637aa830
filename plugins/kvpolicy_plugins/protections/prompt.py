"""The prompt stays."""

from __future__ import annotations

from typing import ClassVar

from kvpolicy.contracts.components import Protection
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Mask


class Prompt(Protection):
    """Keeps every entry of the prompt; it counts inside the budget, so the budget must be longer than the prompt."""

    same_for_layers: ClassVar[bool] = True
    same_for_heads: ClassVar[bool] = True

    def mask(self, view: CacheView) -> Mask:
        return view.valid & (view.positions < view.prompt_length.to(view.device)[:, None, None])

    def reserved(self, prompt_length: int = 0) -> int:
        return prompt_length
