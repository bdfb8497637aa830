"""Attention that the queries to come are expected to pay (Expected Attention)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView, lacking
from kvpolicy.types import Scores
from kvpolicy_plugins._rope import next_position, rope_of


class ExpectedAttention(ImportanceScorer):
    """Expected weight of each entry under normally distributed queries, times the length of its value.

    With mean `m` and covariance `C` of the un-rotated queries so far, both turned by the average rotation `R` to the
    `future` positions that come next: ``softmax_i(scale k_i.Rm + scale^2/2 k_i'RCR'k_i)`` per query head, the mean over
    the group, plus `epsilon`, times ``|v_i|`` (section 3). Entries at positions below `sinks` stay out of the softmax
    and get the largest score of their head. A soft-cap of the logits is not part of the expectation. O(N D^2).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"query_statistics", "rope"})
    paper: ClassVar[str] = "arXiv:2510.00636"
    comparable_across_heads: ClassVar[bool] = True

    future: int = Field(default=512, ge=1)
    """Positions to average the rotation over, from the next token's on."""
    sinks: int = Field(default=4, ge=0)
    """First positions of the row that take no part in the softmax."""
    covariance: bool = True
    """Count the spread of the queries; False leaves their mean alone, which costs O(N D)."""
    value_norm: bool = True
    """Multiply by the length of the value."""
    epsilon: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Added to the expected weight before that, so that a long value counts even where no attention is expected."""

    def laws_excused(self) -> Mapping[str, str]:
        return {"permuting_entries": "sinks are named by position"} if self.sinks else {}

    def score(self, view: CacheView) -> Scores:
        if "query_mean" not in view.extras or "query_covariance" not in view.extras:
            statistics = "`extras` with `query_mean`, `query_covariance` and `query_count`"
            raise lacking("importance: expected_attention", "query statistics", statistics)
        candidates = view.valid & (view.positions >= self.sinks)
        keys = torch.where(view.valid.unsqueeze(-1), view.keys, 0).float() * view.scale
        weights = ops.masked_softmax(self._logits(view, keys), candidates.unsqueeze(2)).mean(dim=2)
        if self.value_norm:
            length = ops.lengths(view.values)
            weights = (weights + self.epsilon) * length
        scores = torch.where(candidates, weights, 0.0)
        return torch.where(view.valid & ~candidates, scores.amax(dim=-1, keepdim=True), scores)

    def _logits(self, view: CacheView, keys: Tensor) -> Tensor:
        """Logarithm of the expected exponential, fp32 `[B, H, G, N]`; `keys` fp32 `[B, H, N, D]`, scaled."""
        rope = rope_of(view, "importance: expected_attention")
        ahead = next_position(view).unsqueeze(2) + torch.arange(self.future, device=view.device)
        cos, sin = (part.unsqueeze(2) for part in ops.mean_rotation(rope, ahead))

        def turned(x: Tensor) -> Tensor:
            return ops.turn(x, cos, sin, interleaved=rope.interleaved)

        mean = turned(view.extras["query_mean"])
        logits = torch.matmul(mean, keys.transpose(-1, -2))
        if not self.covariance:
            return logits
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        spread = turned(turned(view.extras["query_covariance"]).transpose(-1, -2))
        # One query head at a time: all of them at once would be G times the keys in memory.
        bends = [(torch.matmul(keys, each) * keys).sum(dim=-1) for each in spread.unbind(dim=2)]
        return logits + torch.stack(bends, dim=2) / 2
