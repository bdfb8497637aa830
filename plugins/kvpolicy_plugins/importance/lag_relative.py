"""Entries that stand out against the partition after theirs (LagKV)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Mask, Scores

_STILL = 1e-4  # a channel that varies by less of its magnitude says nothing; bfloat16 cannot express less than 4e-3


class LagRelative(ImportanceScorer):
    """How much the channels of an entry differ, each measured by its range in the next partition of the sequence.

    Behind the first `sinks` entries the row is cut into partitions of `lag`. With `m` and `M` the least and largest
    value of each channel in the next partition, ``s = softmax_i(std_channels((x_i - m) / (M - m)))`` within the
    partition, for keys and for values (sections 3.2-3.3); the score is the rank of their mean within the partition, in
    [0, 1). The first `sinks` entries, the last whole partition and what follows it score 1. A row too short for two
    partitions is scored by recency. O(N D), no queries.
    """

    paper: ClassVar[str] = "arXiv:2504.04704"
    same_for_layers: ClassVar[bool] = True
    comparable_across_heads: ClassVar[bool] = True
    laws_not_applicable: ClassVar[Mapping[str, str]] = {"permuting_entries": "an entry is scored in its partition"}

    lag: int = Field(default=128, ge=2)
    """Entries per partition."""
    sinks: int = Field(default=4, ge=0)
    """Entries at the beginning that no partition holds."""
    ranked: bool = True
    """Rank within the partition; False leaves the mean of the two softmaxes, as large as `lag` is small."""

    def score(self, view: CacheView) -> Scores:
        batch, heads, count = view.shape
        order = view.valid.cumsum(dim=-1) - 1 - self.sinks
        held = view.valid.sum(dim=-1, keepdim=True) - self.sinks
        parts = max(count - self.sinks, 0) // self.lag
        scored = view.valid & (order >= 0) & (order < (held // self.lag - 1) * self.lag)
        recency = order / held.clamp(min=1)
        fixed = torch.where((held < 2 * self.lag) & (order >= 0), recency, 1.0)
        if parts < 2:
            return torch.where(view.valid, fixed, 0.0)
        partitions = view.valid & (order >= 0) & (order < parts * self.lag)
        relative = (self._relative(view.keys, partitions, parts) + self._relative(view.values, partitions, parts)) / 2
        if self.ranked:  # equal ones share the lowest rank
            unknown = relative.isnan()
            relative = ops.levelled(relative, torch.ones_like(relative, dtype=torch.bool))
            relative = torch.searchsorted(relative.sort(dim=-1).values, relative) / self.lag
            relative = relative.masked_fill(unknown, float("nan"))  # a rank would hide that there is no number
        room = relative.new_zeros(batch, heads, count)
        room[..., : (parts - 1) * self.lag] = relative.flatten(2)
        return torch.where(scored, ops.unpack(room, partitions), torch.where(view.valid, fixed, 0.0))

    def _relative(self, x: Tensor, partitions: Mask, parts: int) -> Tensor:
        """Softmax within each partition but the last, fp32 `[B, H, parts - 1, lag]`."""
        packed = ops.pack(x, partitions)[:, :, : parts * self.lag].float().unflatten(2, (parts, self.lag))
        low, high = packed[:, :, 1:].amin(dim=3, keepdim=True), packed[:, :, 1:].amax(dim=3, keepdim=True)
        span = high - low
        still = span <= _STILL * torch.maximum(low.abs(), high.abs())
        channels = torch.where(still, 0.0, (packed[:, :, :-1] - low) / torch.where(still, 1.0, span))
        return channels.std(dim=-1).softmax(dim=-1)
