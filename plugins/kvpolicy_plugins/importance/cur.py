"""Long keys with long values matter (CUR)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores

_TINY = 1e-30


class Cur(ImportanceScorer):
    """Squared lengths of key and value, each as a share of its window, combined and divided by their sum per head.

    ``|k_i|^2 / sum_w |k|^2`` and likewise for values, over windows of `window` consecutive entries; the product of the
    two by default. Sums to 1 over a head. O(N D), no queries.
    """

    paper: ClassVar[str] = "arXiv:2509.15038"
    same_for_layers: ClassVar[bool] = True
    comparable_across_heads: ClassVar[bool] = True

    leverage: Literal["product", "mean", "key", "value"] = "product"
    """How the shares of key and value are combined, or the one that counts alone."""
    window: int = Field(default=16, ge=0)
    """Entries per window; 0 for one window over all."""

    def laws_excused(self) -> Mapping[str, str]:
        return {"permuting_entries": "an entry is measured by the sum of its window"} if self.window else {}

    def score(self, view: CacheView) -> Scores:
        key, value = (self._share(view, x) for x in (view.keys, view.values))
        combined = {"product": key * value, "mean": (key + value) / 2, "key": key, "value": value}[self.leverage]
        return combined / combined.sum(dim=-1, keepdim=True).clamp(min=_TINY)

    def _share(self, view: CacheView, x: Tensor) -> Scores:
        count = view.shape[2]
        held = torch.where(view.valid.unsqueeze(-1), x, 0).float()
        # To unit size first: the shares stay, and squares of large numbers stay within fp32.
        squares = (held / held.abs().amax(dim=(2, 3), keepdim=True).clamp(min=_TINY)).square().sum(dim=-1)
        size = min(self.window or count, count)
        packed = ops.pack(squares, view.valid)
        windows = torch.nn.functional.pad(packed, (0, -count % size)).unflatten(-1, (-1, size))
        shares = windows / windows.sum(dim=-1, keepdim=True).clamp(min=_TINY)
        return ops.unpack(shares.flatten(2)[..., :count], view.valid)
