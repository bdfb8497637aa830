"""The entries with the largest values stay (VaSE)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import Protection
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Mask


class LargeValues(Protection):
    """Keeps the entries whose values are largest, of each head; of equal ones the older.

    Few values are far larger than the others, and a model that loses them repeats itself. The newest tokens, which
    another protection keeps, take no part.
    """

    same_for_layers: ClassVar[bool] = True
    shorthand: ClassVar[str | None] = "count"
    paper: ClassVar[str] = "arXiv:2606.03928 (VaSE)"

    count: int = Field(default=256, ge=0)
    """Entries per head; the paper has a quarter of what is kept of the entries that compete."""
    measure: Literal["range", "length"] = "range"
    """Largest number of the value less its smallest (`range`), or its Euclidean norm (`length`)."""
    newest: int = Field(default=128, ge=0)
    """So many of the newest tokens are left to another protection."""

    def mask(self, view: CacheView) -> Mask:
        # By position: counted in entries, the newest would be others after an eviction.
        since = view.seen.to(device=view.device, dtype=torch.int64)[:, None, None] - self.newest
        candidates = view.valid & (view.positions < since)
        values = torch.where(candidates.unsqueeze(-1), view.values, 0)
        size = ops.lengths(values) if self.measure == "length" else (values.amax(-1) - values.amin(-1)).float()
        order = ops.ordered_by(candidates, ops.levelled(size, candidates))
        return candidates & (ops.ranks_in(order) < self.count)

    def reserved(self, prompt_length: int = 0) -> int:
        return self.count
