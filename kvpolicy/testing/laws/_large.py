"""A larger case of continuous numbers, for laws about threads and statistics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvpolicy.contracts.view import CacheView, Rope
from kvpolicy.testing.cases import Case, Layer
from kvpolicy.testing.laws._draws import kind_of_subject, needs_of, observed_by, states_of

_HEADS, _GROUP, _DIM = 2, 2, 16


def make(subject: Any, *, rows: int, slots: int, seed: int, dtype: torch.dtype = torch.float32) -> Case:
    """Make a case with all slots valid; keys lie near a few directions, as those of a model do."""
    kind = kind_of_subject(subject)
    g = torch.Generator().manual_seed(seed)
    needs, states, observe = needs_of(subject), states_of(subject), observed_by(subject)
    shape = (rows, _HEADS, slots)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g)

    centres = normal(rows, _HEADS, 12, _DIM)
    near = torch.randint(0, 12, shape, generator=g)
    keys = centres.gather(2, near.unsqueeze(-1).expand(-1, -1, -1, _DIM)) + 0.7 * normal(*shape, _DIM)
    positions = torch.arange(slots, dtype=torch.int32).expand(shape)
    queries: dict[str, Any] = {}
    if observe:
        queries = {
            "queries": normal(rows, _HEADS, _GROUP, observe, _DIM).to(dtype),
            "query_positions": torch.arange(slots - observe, slots, dtype=torch.int32).expand(rows, -1),
            "query_valid": torch.ones(rows, observe, dtype=torch.bool),
        }
    view = CacheView(
        keys=keys.to(dtype),
        values=normal(*shape, _DIM).to(dtype),
        positions=positions,
        valid=torch.ones(shape, dtype=torch.bool),
        scale=_DIM**-0.5,
        layer_idx=0,
        num_layers=1,
        prompt_length=torch.full((rows,), slots // 8),
        seen=torch.full((rows,), slots),
        compaction=torch.zeros(rows, dtype=torch.int64),
        state={s.name: (8 * normal(*shape).abs()).to(s.dtype) for s in states},
        rope=Rope(1.0 / 100.0 ** (torch.arange(0, _DIM, 2) / _DIM)),
        rope_positions=positions,
        budget=torch.full((rows,), slots // 2),
        **queries,
    )
    view = replace(view, extras=_extras(needs, normal, view))
    aligned = {name: normal(*shape) for name in ("importance", "redundancy", "scores")}
    marked = torch.rand(shape, generator=g)
    aligned |= {"protected": marked < 0.1, "kept": marked < 0.5}
    protected = aligned["protected"].sum(-1)
    budget = slots // 2
    if kind == "policy":
        from kvpolicy.testing.laws._draws import least_budget

        budget = max(budget, *least_budget(subject, [view]))
    return Case((Layer(view, aligned),), protected.clamp(min=slots // 2), (budget,) * rows)


def _extras(needs: Collection[str], normal: Callable[..., Tensor], view: CacheView) -> Mapping[str, Tensor]:
    """Return what is declared as a need."""
    rows, heads, _ = view.shape
    found: dict[str, Tensor] = {}
    if "query_statistics" in needs:
        factor = normal(rows, heads, _GROUP, 2 * _DIM, _DIM)
        found["query_count"] = view.seen
        found["query_mean"] = normal(rows, heads, _GROUP, _DIM)
        found["query_covariance"] = factor.transpose(-1, -2) @ factor / (2 * _DIM)
    if "weights" in needs:
        found["output_projection"] = normal(heads, _GROUP, _DIM, 2 * _DIM).to(view.keys.dtype) / 8
    if "modality" in needs:
        found["modality"] = view.valid & (view.positions % 3 == 1)
    return found
