"""Several layers as one view: the same scores, no copies, and only where nothing differs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy import Rope
from kvpolicy.contracts.view import CacheView
from kvpolicy.errors import SpecError
from kvpolicy.policy.fuse import folded

L, B, H, G, N, D, Q = 5, 2, 2, 3, 60, 8, 4


def views(rows: slice = slice(0, B)) -> list[CacheView]:
    keys, values = torch.randn(L, B, H, N + 9, D), torch.randn(L, B, H, N + 9, D)
    positions = torch.arange(N, dtype=torch.int32).expand(B, H, N)
    valid = (torch.arange(N) < torch.tensor([N, N - 7])[:, None])[:, None].expand(B, H, N)
    count = len(range(B)[rows])
    return [
        CacheView(
            keys[i, rows, :, :N], values[i, rows, :, :N], positions[rows], valid[rows], 0.3, i, L,
            torch.tensor([9, 4])[rows], torch.tensor([N, N - 7])[rows], torch.zeros(count, dtype=torch.int64),
            queries=torch.randn(count, H, G, Q, D),
            query_positions=torch.tensor([[N - 4, N - 3, N - 2, N - 1], [N - 11, N - 10, N - 9, N - 8]])[rows].int(),
            query_valid=torch.ones(count, Q, dtype=torch.bool),
            budget=torch.tensor([30, 20])[rows],
        )
        for i in range(L)
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [slice(0, B), slice(1, 2)])
def test_folded_layers_score_as_single_ones(rows):
    policy = kvpolicy.load("rkv", budget=30).build()
    layers = views(rows)
    ((one, count),) = folded(layers)
    assert count == L
    assert one.keys.untyped_storage().data_ptr() == layers[0].keys.untyped_storage().data_ptr()
    together = policy.retention(one).unflatten(0, (L, -1))
    for i, view in enumerate(layers):
        torch.testing.assert_close(together[i], policy.retention(view), atol=1e-6, rtol=1e-5)
    kept = policy.select(layers, [30, 20][rows])
    single = policy.select(tuple(layers), [30, 20][rows])  # what is no list is taken one by one
    for a, b in zip(kept, single, strict=True):
        assert torch.equal(a.indices, b.indices)


def test_layers_that_differ_stay_apart():
    layers = views()
    layers[1] = replace(layers[1], scale=0.7)
    layers[3] = replace(layers[3], rope=Rope(torch.ones(4)))
    assert [count for _, count in folded(layers)] == [1, 1, 1, 1, 1]
    layers = views()
    layers[4] = replace(layers[4], rope=Rope(torch.ones(4)))
    assert [count for _, count in folded(layers)] == [4, 1]
    layers[2] = replace(layers[2], keys=layers[2].keys.clone())
    assert [count for _, count in folded(layers)][-1] == 1
    assert sum(count for _, count in folded(layers)) == L


def test_a_policy_with_a_part_that_knows_its_layer_is_not_folded(monkeypatch):
    monkeypatch.setattr("kvpolicy.policy.decide.folded", lambda _: pytest.fail("folded"))
    kvpolicy.load("random", budget=30).build().select(views(), [30, 20])
    with pytest.raises(pytest.fail.Exception):
        kvpolicy.load("rkv", budget=30).build().select(views(), [30, 20])


def test_parts_that_look_ahead_refuse_chunks():
    with pytest.raises(SpecError, match="prefill_chunk: non_causal lets the tokens of the prompt look ahead"):
        kvpolicy.load("compactor").replace("prefill_chunk", 64)
