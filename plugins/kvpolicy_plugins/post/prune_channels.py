"""The channels of the keys that queries do not look at become 0 (ThinK)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import PostOperation
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import KeepIndices
from kvpolicy_plugins._window import last_queries


class PruneChannels(PostOperation):
    """Sets the least used channels of the kept keys to 0, and frees no memory; the newest entries keep all channels.

    A channel is worth ``mean(q^2) * mean(k^2)``, over the last `observe` queries of all query heads of the KV head and
    over the keys that stay (arXiv:2407.21018). The channels are zeroed where they are: attention is what it
    would be with keys of fewer channels, but the cache stores the zeros. Of equal channels the first ones go.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    paper: ClassVar[str] = "arXiv:2407.21018"
    changes: ClassVar[Literal["positions", "values", "keys"]] = "keys"

    ratio: float = Field(default=0.4, ge=0, lt=1)
    """Share of the channels that are zeroed, rounded down."""
    observe: int = Field(default=32, ge=1)
    """Number of last queries to look at; fewer when the row is shorter."""
    recent: int = Field(default=32, ge=0)
    """Newest entries that keep all channels."""

    def observed_queries(self) -> int:
        return self.observe

    def apply(self, view: CacheView, kept: KeepIndices) -> Mapping[str, Tensor]:
        window = last_queries(view, self.observe, "post: prune_channels")
        queries = torch.where(window.valid[:, None, None, :, None], window.queries, 0.0).to(torch.float32)
        stays = kept.mask(view.shape[2]) & view.valid
        keys = torch.where(stays.unsqueeze(-1), view.keys, 0.0).to(torch.float32)
        # Means over the same queries and keys for all channels rank as sums do.
        worth = queries.square().sum((2, 3)) * keys.square().sum(2)
        worth = ops.levelled(worth, torch.ones_like(worth, dtype=torch.bool))
        order = worth.sort(dim=-1, stable=True).indices
        gone = torch.zeros_like(worth, dtype=torch.bool)
        gone.scatter_(-1, order[..., : int(self.ratio * worth.shape[-1])], True)
        pruned = stays & ~view.newest(self.recent) & window.valid.any(-1)[:, None, None]
        return {"keys": view.keys.masked_fill(gone.unsqueeze(2) & pruned.unsqueeze(-1), 0.0)}
