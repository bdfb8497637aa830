"""Mean and covariance of the queries so far, without their rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.view import Rope

SKIPPED = 4
"""Queries of the first positions take no part: attention sinks are unlike all others."""


@dataclass
class QueryStatistics:
    """One layer's statistics, updated block by block (Chan, Golub and LeVeque's pairwise update).

    Attributes:
        count: int64 `[B]`, queries counted.
        mean: fp32 `[B, H, G, D]`.
        scatter: fp32 `[B, H, G, D, D]`, sum of the outer products of the deviations.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def empty(queries: Tensor) -> QueryStatistics:
        """Start with nothing, for queries `[B, H, G, Q, D]`."""
        batch, heads, groups, _, dim = queries.shape
        return QueryStatistics(
            torch.zeros(batch, dtype=torch.int64, device=queries.device),
            torch.zeros(batch, heads, groups, dim, device=queries.device),
            torch.zeros(batch, heads, groups, dim, dim, device=queries.device),
        )

    def add(self, queries: Tensor, positions: Tensor, valid: Tensor, rope: Rope) -> None:
        """Count queries `[B, H, G, Q, D]`, rotated to their positions (int32 `[B, Q]`); `valid` is bool `[B, Q]`."""
        counted = valid & (positions >= SKIPPED)
        plain = ops.rotate(queries.float(), rope, -positions[:, None, None])
        weight = counted[:, None, None, :, None]
        plain = torch.where(weight, plain, 0.0)
        new = counted.sum(1)
        total = (self.count + new).clamp(min=1)[:, None, None, None]
        mean = plain.sum(3) / new.clamp(min=1)[:, None, None, None]
        deviation = torch.where(weight, plain - mean.unsqueeze(3), 0.0)
        shift = torch.where(new[:, None, None, None] > 0, mean - self.mean, 0.0)
        cross = (self.count * new)[:, None, None, None] / total
        # Not in place: what was made in inference mode may not be written to outside of it, and both come here.
        self.scatter = (
            self.scatter + deviation.transpose(3, 4) @ deviation + (cross * shift).unsqueeze(-1) * shift.unsqueeze(-2)
        )
        self.mean = self.mean + shift * new[:, None, None, None] / total
        self.count = self.count + new

    def take(self, index: Tensor) -> QueryStatistics:
        """Return those of the rows `index`, int64 `[B']`."""
        here = index.to(self.count.device)
        return QueryStatistics(*(t.index_select(0, here) for t in (self.count, self.mean, self.scatter)))

    def extras(self, rows: slice) -> dict[str, Tensor]:
        """Return what a view shows of them: `query_count`, `query_mean` and `query_covariance`."""
        count = self.count[rows]
        divisor = count.clamp(min=1)[:, None, None, None, None]
        return {
            "query_count": count,
            "query_mean": self.mean[rows],
            "query_covariance": self.scatter[rows] / divisor,
        }
