"""A small cache view to score, for all tests of components."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvpolicy.contracts.view import CacheView, Rope


@pytest.fixture
def make_view():
    """Return a function: tensors that are not given are drawn; `queries` is [B, H, G, Q, D] or None."""

    def make(keys=None, *, queries=None, shape=(2, 2, 20, 8), query_positions=None, seed=0, **fields):
        generator = torch.Generator().manual_seed(seed)
        if keys is None:
            keys = torch.randn(shape, generator=generator)
        B, H, N, D = keys.shape
        defaults = {
            "values": torch.randn(B, H, N, D, generator=generator),
            "positions": torch.arange(N, dtype=torch.int32).expand(B, H, N),
            "valid": torch.ones(B, H, N, dtype=torch.bool),
            "scale": D**-0.5,
            "layer_idx": 0,
            "num_layers": 1,
            "prompt_length": torch.full((B,), 5),
            "seen": torch.full((B,), N),
            "compaction": torch.zeros(B, dtype=torch.int64),
            "rope": Rope(1.0 / 10000 ** (torch.arange(0, D, 2).float() / D)),
        }
        if queries is not None:
            Q = queries.shape[3]
            at = torch.arange(N - Q, N, dtype=torch.int32).expand(B, Q) if query_positions is None else query_positions
            defaults |= {"queries": queries, "query_positions": at, "query_valid": torch.ones(B, Q, dtype=torch.bool)}
        return CacheView(keys=keys, **(defaults | fields))

    return make


@pytest.fixture
def view(make_view):
    """Two rows and heads, 40 slots of which some hold nothing but NaN; positions have gaps."""
    valid = torch.rand(2, 2, 40, generator=torch.Generator().manual_seed(5)) < 0.8
    valid[1, 0, :9] = False
    steps = torch.randint(1, 4, (2, 2, 40), generator=torch.Generator().manual_seed(6))
    positions = (steps.cumsum(-1) - 1).to(torch.int32)
    made = make_view(shape=(2, 2, 40, 8), valid=valid, positions=positions, seen=torch.tensor([120, 121]))
    keys, values = (torch.where(valid[..., None], x, float("nan")) for x in (made.keys, made.values))
    return replace(made, keys=keys, values=values)
