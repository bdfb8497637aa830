"""Contiguous positions (StreamingLLM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import PostOperation
from kvpolicy.contracts.view import CacheView
from kvpolicy.errors import UnsupportedError
from kvpolicy.types import KeepIndices


class Rerotate(PostOperation):
    """Turns the kept keys to the positions 0, 1, 2, ...: distances are those inside the cache.

    This is what lets a model run past the length it was trained for. Each compaction turns the cached keys once more
    and rounds them to the cache's dtype.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rope"})
    paper: ClassVar[str] = "arXiv:2309.17453"
    changes: ClassVar[Literal["positions", "values", "keys"]] = "positions"

    def apply(self, view: CacheView, kept: KeepIndices) -> Mapping[str, Tensor]:
        if view.rope is None:
            raise UnsupportedError(
                "post: rerotate needs the rotary embedding and the view holds none, leave post out to keep positions."
            )
        before = view.positions if view.rope_positions is None else view.rope_positions
        column = torch.arange(kept.indices.shape[-1], device=view.device, dtype=torch.int32)
        # Padding columns repeat the last kept slot and must give it the same position.
        rank = torch.minimum(column, (kept.lengths.unsqueeze(-1) - 1).clamp(min=0).to(torch.int32))
        after = before.scatter(-1, kept.indices, rank)
        return {"keys": ops.rotate(view.keys, view.rope, after - before), "rope_positions": after}
