"""Attention as calibrated queries will pay it over growing distances (TriAttention)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.tables import TableOf, load_table
from kvpolicy.types import Scores
from kvpolicy_plugins._rope import next_position, rope_of


class Trigonometric(ImportanceScorer):
    """Logits of a head's mean query at several distances ahead, plus what the mean hides of the queries' magnitude.

    For rotary frequency `f` let `q_f` be the calibrated mean query and `|q|_f` the mean magnitude, before rotation,
    `k_f` the key and `p` its position; at `t`, the next position, and distances `d` = 1, 2, 4, ... up to `reach`:
    ``mean_d sum_f |q_f||k_f| cos((t + d - p) w_f + arg q_f - arg k_f) + sum_f (|q|_f - |q_f|) |k_f|`` per query head
    (section 4). The cosine sum is the product of the cached key with the mean query rotated to `t + d`, so no key is
    un-rotated. Dimensions without rotation take no part. O(N D), times the number of distances for ``max``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rope"})
    paper: ClassVar[str] = "arXiv:2604.04921"
    laws_not_applicable: ClassVar[Mapping[str, str]] = {"permuting_heads": "every head has statistics of its own"}

    table: Annotated[str, TableOf("query_frequencies")]
    """Table of kind ``query_frequencies``: its name, or the path of its file."""
    reach: int = Field(default=65536, ge=1)
    """Largest distance ahead; the distances are the powers of 2 up to it."""
    distances: Literal["mean", "max"] = "mean"
    """How the scores at the distances become one."""
    group: Literal["max", "mean"] = "max"
    """How the query heads that share a KV head become one."""
    standardise: bool = True
    """Bring each query head's scores to mean 0 and deviation 1 over the row's entries before that."""

    def score(self, view: CacheView) -> Scores:
        table, rope = load_table(self.table, "query_frequencies"), rope_of(view, "importance: trigonometric")
        mean, magnitude = table.layer("mean", view), table.layer("magnitude", view)
        held = torch.where(view.valid.unsqueeze(-1), view.keys, 0).float()[..., : 2 * len(rope.inv_freq)]
        pairs = held.unflatten(-1, (-1, 2)) if rope.interleaved else held.unflatten(-1, (2, -1)).transpose(-1, -2)
        lengths = torch.linalg.vector_norm(pairs, dim=-1)
        hidden = (magnitude - torch.linalg.vector_norm(mean, dim=-1)).clamp(min=0.0)
        query = mean.flatten(-2) if rope.interleaved else mean.transpose(-1, -2).flatten(-2)
        scores = self._ahead(view, query, held) + torch.matmul(hidden, lengths.transpose(-1, -2))
        if self.standardise:
            scores = ops.z_scores(scores, view.valid.unsqueeze(2))
        one = scores.amax(dim=2) if self.group == "max" else scores.mean(dim=2)
        return torch.where(view.valid, one, 0.0)

    def _ahead(self, view: CacheView, query: Tensor, keys: Tensor) -> Tensor:
        """Products of keys `[B, H, N, R]` with the query `[H, G, R]` rotated ahead, fp32 `[B, H, G, N]`."""
        rope = rope_of(view, "importance: trigonometric")
        powers = 2 ** torch.arange(self.reach.bit_length(), device=view.device)
        ahead = next_position(view).unsqueeze(2) + powers

        def product(positions: Tensor) -> Tensor:
            cos, sin = (part.unsqueeze(2) for part in ops.mean_rotation(rope, positions))
            turned = ops.turn(query.unsqueeze(0), cos, sin, interleaved=rope.interleaved)
            return torch.matmul(turned, keys.transpose(-1, -2))

        if self.distances == "mean":  # the product is linear: one rotation that is the average of all
            return product(ahead)
        best = product(ahead[..., :1])
        for column in range(1, ahead.shape[-1]):
            best = torch.maximum(best, product(ahead[..., column : column + 1]))
        return best
