"""What the output loses with a key, a value, or both, to second order (OBCache)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores
from kvpolicy_plugins._window import attention_pieces, last_queries


class OptimalBrain(ImportanceScorer):
    """Optimal Brain Damage for entries: squared change of the last queries' outputs, to first order.

    With weight `a`, logit `s` and output `o` of a query, an entry's saliency is ``a^2 |v|^2`` if its value becomes 0,
    ``a^2 s^2 |v - o|^2`` if its key does, and ``a^2 |v + s (v - o)|^2`` if both do; summed over the queries, mean over
    the query heads that share the entry. O(Q N D) operations.
    """

    same_for_layers: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    paper: ClassVar[str] = "arXiv:2510.07651 (OBCache)"

    observe: int = Field(default=16, ge=1)
    """Number of last queries whose outputs count (the paper's perturbation window); fewer when the row is shorter."""
    prune: Literal["joint", "key", "value"] = "joint"
    """What becomes 0."""

    def observed_queries(self) -> int:
        return self.observe

    def score(self, view: CacheView) -> Scores:
        window = last_queries(view, self.observe, "importance: optimal_brain")
        values = torch.where(view.valid.unsqueeze(-1), view.values, 0).float()
        squares = values.square().sum(-1)
        saliency = torch.zeros(view.shape, dtype=torch.float32, device=view.device)
        for part, weights, logits in attention_pieces(view, window):
            here = values[:, part].unsqueeze(2)
            output = weights @ here
            along = output @ here.transpose(-1, -2)
            length = output.square().sum(-1, keepdim=True)
            # The change is the weight times (p v - r o); its square is written out, as no [Q, N, D] would fit.
            r = torch.zeros_like(logits) if self.prune == "value" else logits
            p = r if self.prune == "key" else 1 + r
            change = p.square() * squares[:, part, None, None] - 2 * p * r * along + r.square() * length
            saliency[:, part] = (weights.square() * change.clamp(min=0)).sum(3).mean(2)
        return saliency
