"""Nothing matters: the control of every comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores


class Random(ImportanceScorer):
    """Uniform in [0, 1), drawn anew at every compaction.

    The number is a hash of seed, layer, KV head, original position and compaction, so a row of a batch draws what it
    would draw alone, and the same slot draws the same on every device.
    """

    shorthand: ClassVar[str | None] = "seed"
    comparable_across_heads: ClassVar[bool] = True
    comparable_across_layers: ClassVar[bool] = True
    rounded: ClassVar[bool] = False
    laws_not_applicable: ClassVar[Mapping[str, str]] = {
        "permuting_heads": "each head draws its own numbers",
        "permuting_entries": "the draw belongs to the position, whatever lies there",
    }

    seed: int = Field(default=0, ge=0, lt=2**64)
    """Another seed is another draw."""

    def score(self, view: CacheView) -> Scores:
        head = view.head_span.numbers(view.device)[:, None]
        draws = ops.counter_uniform(
            self.seed, view.layer_idx, head, view.positions, view.compaction[:, None, None].to(view.device)
        )
        return draws.masked_fill(~view.valid, 0.0)
