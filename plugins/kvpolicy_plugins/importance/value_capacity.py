"""How much of the values' directions would be missed with an entry (CapKV)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores
from kvpolicy_plugins._window import last_queries

_TINY = 1e-15
_LEAST = 1e-12  # of the trace


class ValueCapacity(ImportanceScorer):
    """``w v' (I + sum_j w_j v_j v_j')^-1 v``: leverage of each value among those of its head, weighted by its key.

    The weight is ``exp(sharpness * cos(k, q))`` with `q` the mean of the last queries, over the query heads as well. An
    entry whose value others describe is worth little, one that alone points somewhere much. O(N D^2), in fp64.
    """

    same_for_layers: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    paper: ClassVar[str] = "arXiv:2604.25975 (CapKV)"

    observe: int = Field(default=32, ge=1)
    """Number of last queries whose mean keys are compared with; fewer when the row is shorter."""
    sharpness: float = Field(default=5.0, ge=0, le=80)
    """How much a key that points to the queries raises the weight of its value; 0 for values alone."""

    def observed_queries(self) -> int:
        return self.observe

    def score(self, view: CacheView) -> Scores:
        window = last_queries(view, self.observe, "importance: value_capacity")
        held = view.valid.unsqueeze(-1)
        queries = torch.where(window.valid[:, None, None, :, None], window.queries, 0).float()
        query = (queries.sum(3) / window.number()[..., None]).mean(2)
        keys = torch.where(held, view.keys, 0).float()
        weight = (self.sharpness * _cosines(keys, query)).exp()
        values = torch.where(held, view.values, 0).double() * weight.double().sqrt().unsqueeze(-1)
        gram = values.transpose(-1, -2) @ values
        unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        # Beside very large values the unit would be lost to rounding, and with it that the matrix is definite.
        least = (_LEAST * gram.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp(min=1.0)
        # Unlike `cholesky` it does not wait for the device to say so.
        lower, _ = torch.linalg.cholesky_ex(gram + unit * least[..., None, None])
        white: Tensor = torch.linalg.solve_triangular(lower, values.transpose(-1, -2), upper=False)
        return white.square().sum(-2).float().masked_fill(~view.valid, 0.0)


def _cosines(keys: Tensor, query: Tensor) -> Tensor:
    """Cosine of each key of `[B, H, N, D]` with its head's query `[B, H, D]`; 0 where one has no length."""
    lengths = torch.linalg.vector_norm(keys, dim=-1) * torch.linalg.vector_norm(query, dim=-1, keepdim=True)
    cosines: Tensor = (keys @ query.unsqueeze(-1)).squeeze(-1) / lengths.clamp(min=_TINY)
    return cosines
