from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvpolicy import ops


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(2, 3, 2, 4, 8, generator=generator)
    keys = torch.randn(2, 3, 10, 8, generator=generator)
    positions = torch.arange(10, dtype=torch.int32).expand(2, 3, 10)
    query_positions = torch.tensor([[6, 7, 8, 9], [9, 3, 5, 4]], dtype=torch.int32)
    return (
        queries,
        query_positions,
        torch.ones(2, 4, dtype=torch.bool),
        keys,
        positions,
        torch.ones(2, 3, 10, dtype=torch.bool),
    )


def test_equals_sdpa():
    queries, query_positions, query_valid, keys, positions, valid = inputs()
    weights = ops.attention_weights(queries, query_positions, query_valid, keys, positions, valid, scale=0.3)
    mask = positions[0, 0] <= query_positions[:, None, None, :, None]
    values = torch.eye(10).expand(2, 3, 1, 10, 10)
    expected = scaled_dot_product_attention(queries, keys.unsqueeze(2), values, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-5)


def test_invalid_slots_and_queries_hold_zeros():
    queries, query_positions, query_valid, keys, positions, valid = inputs(1)
    valid = valid.clone()
    valid[0, :, :3], valid[1, 1] = False, False
    query_valid[0, 1] = False
    keys = torch.where(valid[..., None], keys, float("inf"))
    queries = torch.where(query_valid[:, None, None, :, None], queries, float("nan"))
    weights = ops.attention_weights(queries, query_positions, query_valid, keys, positions, valid, scale=0.3)
    assert weights.isfinite().all()
    assert (weights[:, :, :, :, :][~valid[:, :, None, None].expand_as(weights)] == 0).all()
    assert (weights[0, :, :, 1] == 0).all()
    torch.testing.assert_close(weights[0, :, :, 0].sum(-1), torch.ones(3, 2))


def test_sinks_take_their_share_and_softcap_comes_first():
    queries, query_positions, query_valid, keys, positions, valid = inputs(2)
    sinks = torch.randn(3, 2)
    weights = ops.attention_weights(
        queries, query_positions, query_valid, keys, positions, valid, scale=1.0, softcap=1.5, attention_sinks=sinks
    )
    logits = 1.5 * torch.tanh((queries @ keys.unsqueeze(2).mT) / 1.5)
    logits = logits.masked_fill(positions[0, 0] > query_positions[:, None, None, :, None], float("-inf"))
    with_sink = torch.cat([logits, sinks[None, :, :, None, None].expand(2, 3, 2, 4, 1)], -1)
    torch.testing.assert_close(weights, with_sink.softmax(-1)[..., :-1], atol=1e-6, rtol=1e-5)


def test_half_precision_is_upcast_first():
    queries, query_positions, query_valid, keys, positions, valid = inputs(3)
    half = [ops.attention_weights(q, query_positions, query_valid, k, positions, valid, scale=0.3) for q, k in (
        (queries.bfloat16(), keys.bfloat16()), (queries.bfloat16().float(), keys.bfloat16().float()),
    )]  # fmt: skip
    torch.testing.assert_close(half[0], half[1], atol=0, rtol=0)


def test_softmax_of_nothing_is_nothing():
    assert (ops.masked_softmax(torch.full((2, 3), float("nan")), torch.zeros(2, 3, dtype=torch.bool)) == 0).all()
    assert ops.masked_softmax(torch.empty(2, 0), torch.empty(2, 0, dtype=torch.bool)).shape == (2, 0)
