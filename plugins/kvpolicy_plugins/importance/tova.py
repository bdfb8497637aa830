"""Attention of the last query (TOVA)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView, lacking
from kvpolicy.types import Scores


class Tova(ImportanceScorer):
    """Attention weights of the newest query, mean over the query heads of each KV head.

    The method keeps one set per layer by the mean over all its heads: ``selector: {use: top_k, scope: layer}``. The
    newest entry takes part like any other; kvpress keeps it whatever it scores, as ``protect: {recent: 1}`` does.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    paper: ClassVar[str] = "arXiv:2401.06104"
    comparable_across_heads: ClassVar[bool] = True
    laws_not_applicable: ClassVar[Mapping[str, str]] = {"query_order_ignored": "it looks at a single query"}

    def observed_queries(self) -> int:
        return 1

    def score(self, view: CacheView) -> Scores:
        if view.queries is None or view.query_positions is None or view.query_valid is None:
            raise lacking("importance: tova", "the last query", "`queries`, `query_positions` and `query_valid`")
        if view.queries.shape[3] == 0:
            return torch.zeros(view.shape, dtype=torch.float32, device=view.device)
        newest = view.query_positions.masked_fill(~view.query_valid, -1).argmax(-1, keepdim=True)
        batch, heads, group, _, dim = view.queries.shape
        weights = ops.attention_weights(
            view.queries.gather(3, newest[:, None, None, :, None].expand(batch, heads, group, 1, dim)),
            view.query_positions.gather(1, newest),
            view.query_valid.gather(1, newest),
            view.keys,
            view.positions,
            view.valid,
            scale=view.scale,
            softcap=view.softcap,
            attention_sinks=view.attention_sinks,
        )
        return weights.mean(2).squeeze(2)
