"""What is evicted lives on in its nearest neighbour's value (CaM, D2O)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import PostOperation
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import KeepIndices


class MergeValues(PostOperation):
    """Folds the value of every evicted entry into the entry that stays with the most similar key.

    With ``w = max(cos, 0) * |v| / (|v| + |v_s|)`` for the evicted values `v` whose nearest survivor is `s`, ``v_s``
    becomes ``(v_s + sum(w * v)) / (1 + sum(w))``, summed in fp32. Keys stay as they are, because the mean of two
    rotated keys is no rotation of anything. Cost: evicted x kept similarities, in blocks.
    """

    shorthand: ClassVar[str | None] = "threshold"
    paper: ClassVar[str] = "arXiv:2406.13035 (D2O)"
    changes: ClassVar[Literal["positions", "values", "keys"]] = "values"

    threshold: float = Field(default=0.0, ge=0, le=1)
    """Smallest cosine between the keys at which a value is merged; an entry that is near to none is lost."""

    def apply(self, view: CacheView, kept: KeepIndices) -> Mapping[str, Tensor]:
        return {"values": ops.merged_values(view.keys, view.values, view.valid, kept, self.threshold)}
