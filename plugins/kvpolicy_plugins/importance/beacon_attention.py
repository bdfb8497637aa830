"""Attention of the queries that stand for the sorts of queries so far (BeaconKV)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Int64
from pydantic import Field
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.ops.attention import attention_logits
from kvpolicy.types import Queries, Scores
from kvpolicy_plugins._rope import rope_of
from kvpolicy_plugins._window import last_queries

_TINY = 1e-15


class BeaconAttention(ImportanceScorer):
    """Attention of a few of the last queries that are as different as possible, turned to the row's next position.

    The newest query is the first beacon of a KV head; each further one is the query that is least like the beacon
    nearest to it, by the mean cosine over the query heads, all turned to one position. Of equal ones the newer goes.
    Every query then counts for its nearest beacon. A reasoning model that goes back to its plan asks with queries that
    the last window does not hold; a beacon stands for them.
    """

    same_for_layers: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "rope"})
    paper: ClassVar[str] = "arXiv:2609.04971 (BeaconKV)"
    comparable_across_heads: ClassVar[bool] = True

    observe: int = Field(default=256, ge=1)
    """Number of last queries that beacons are chosen from; fewer when the row is shorter."""
    beacons: int = Field(default=8, ge=1)
    """Queries that are chosen for each KV head, or all if there are fewer."""
    over: Literal["max", "mean"] = "max"
    """An entry is worth the most that any beacon attends to it, or the mean over the beacons, each with the share of
    the queries that it stands for; either is a mean over the query heads."""

    def observed_queries(self) -> int:
        return self.observe

    def score(self, view: CacheView) -> Scores:
        window = last_queries(view, self.observe, "importance: beacon_attention")
        if 0 in (window.queries.shape[3], view.shape[2]):
            return torch.zeros(view.shape, dtype=torch.float32, device=view.device)
        # From the newest on: a ring holds them in any order.
        order = window.positions.masked_fill(~window.valid, -1).argsort(dim=-1, descending=True, stable=True)
        valid, at = window.valid.gather(1, order), window.positions.gather(1, order)
        rows = order[:, None, None, :, None].expand_as(window.queries)
        queries = torch.where(valid[:, None, None, :, None], window.queries.gather(3, rows), 0).float()
        ahead = view.seen.to(view.device)[:, None] - at
        queries = ops.rotate(queries, rope_of(view, "importance: beacon_attention"), ahead[:, None, None])
        chosen, share = _beacons(queries, valid, self.beacons)
        index = chosen[:, :, None, :, None].expand(*queries.shape[:3], chosen.shape[-1], queries.shape[-1])
        logits = attention_logits(queries.gather(3, index), view.keys, view.scale, view.softcap)
        sinks = None if view.attention_sinks is None else view.attention_sinks[None, :, :, None]
        weights = ops.masked_softmax(logits, view.valid[:, :, None, None], sinks).mean(2)
        if self.over == "max":
            return (weights * (share > 0).unsqueeze(-1)).amax(2)
        return (weights * share.unsqueeze(-1)).sum(2)


def _beacons(queries: Queries, valid: Bool[Tensor, "B Q"], number: int) -> tuple[Int64[Tensor, "B H K"], Tensor]:
    """Choose queries that are far from each other, and say what share of all each of them stands for.

    Args:
        queries: fp32 `[B, H, G, Q, D]`, the newest first and those that are not valid last.
        valid: bool `[B, Q]`.
        number: how many to choose at most.

    Returns:
        int64 `[B, H, K]`, places among the queries, and fp32 `[B, H, K]`, 0 for a place beyond the valid ones.
    """
    unit = queries / torch.linalg.vector_norm(queries, dim=-1, keepdim=True).clamp(min=_TINY)
    batch, heads, group, count, _ = unit.shape
    free = valid.unsqueeze(1).expand(batch, heads, count).clone()
    nearest = torch.full((batch, heads, count), -2.0, device=queries.device)
    places, near = [], []
    for _ in range(min(number, count)):
        # The least like goes first; levels, for rounding must not choose another query.
        place = ops.ordered_by(free, -ops.levelled(nearest, free))[..., :1]
        beacon = unit.gather(3, place[:, :, None, :, None].expand(batch, heads, group, 1, unit.shape[-1]))
        cosine = (unit * beacon).sum(-1).mean(2)
        near.append(cosine.masked_fill(~free.gather(-1, place), -2.0))
        nearest = torch.maximum(nearest, cosine)
        free.scatter_(-1, place, False)
        places.append(place)
    owner = torch.stack(near, -1).argmax(-1, keepdim=True)
    mine = torch.zeros(batch, heads, count, len(places), device=queries.device).scatter_(-1, owner, 1.0)
    share = (mine * valid[:, None, :, None]).sum(2) / valid.sum(-1).clamp(min=1)[:, None, None]
    return torch.cat(places, -1), share
