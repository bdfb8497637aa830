"""Ragged attention in half precision against float64: products are fp32, whatever the cache's dtype."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvpolicy import ops
from kvpolicy.ops.ragged import Blocks
from kvpolicy.runtimes.hf.attention import packed_attention

H, G, D, N, T, P = 2, 3, 128, 96, 16, 16


def inputs(dtype, query_scale, key_scale, count=1):
    """Queries, keys and values of two KV heads; the first `N` keys lie in blocks, the others in the tail."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, H * G, count, D, generator=generator) * query_scale
    keys = torch.randn(1, H, N + T, D, generator=generator) * key_scale
    keys[:, :, N + 6] = queries[:, ::G, 0] * 8  # one large logit in the tail and one in the base
    keys[:, :, 5] = queries[:, 1::G, 0] * 8
    values = torch.randn(1, H, N + T, D, generator=generator)
    return queries.to(dtype), keys.to(dtype), values.to(dtype)


def attend(queries, keys, values, visible=None, **more):
    owner = torch.arange(H).repeat_interleave(N // P)
    blocks = (t[0, :, :N].reshape(-1, P, D) for t in (keys, values))
    base = Blocks(*blocks, owner, torch.full((owner.numel(),), P))
    return ops.ragged_attention(queries, base, keys[:, :, N:], values[:, :, N:], visible, scale=D**-0.5, **more)


def exact(queries, keys, values, softcap=None, sinks=None):
    keys, values = (t.double().repeat_interleave(G, 1) for t in (keys, values))
    logits = queries.double() @ keys.transpose(2, 3) * D**-0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if sinks is not None:
        column = sinks.double().reshape(1, H * G, 1, 1).expand(*logits.shape[:3], 1)
        return torch.cat([logits, column], -1).softmax(-1)[..., :-1] @ values
    return logits.softmax(-1) @ values


HALF_ULP = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Half a unit in the last place, relative: what the rounding of the result alone may cost."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("query_scale", "key_scale"), [(1, 1), (1, 4), (1, 10), (25, 100)])
@pytest.mark.parametrize("more", [{}, {"softcap": 30.0}, {"sinks": torch.linspace(-2, 4, H * G).view(H, G)}])
def test_only_the_result_is_rounded(dtype, query_scale, key_scale, more):
    queries, keys, values = inputs(dtype, query_scale, key_scale, count=4)
    named = {"attention_sinks" if name == "sinks" else name: value for name, value in more.items()}
    found, expected = attend(queries, keys, values, **named), exact(queries, keys, values, **more)
    assert found.dtype == dtype
    # fp32 logits of some 60,000 are good to 1/256, which is what the exponential then sees.
    largest = float((queries.double() @ keys.double().repeat_interleave(G, 1).transpose(2, 3)).abs().max()) * D**-0.5
    torch.testing.assert_close(found.double(), expected, rtol=HALF_ULP[dtype], atol=1e-5 + 1e-6 * largest)


def test_products_beyond_the_range_of_fp16_are_finite():
    """Logits of 60,000 fit into fp16 and the products that they are scaled from do not."""
    queries, keys, values = inputs(torch.float16, 25, 100)
    products = queries.double() @ keys.double().repeat_interleave(G, 1).transpose(2, 3)
    assert float(products.max()) > 5e5
    found = attend(queries, keys, values)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double(), exact(queries, keys, values), rtol=1e-3, atol=1e-3)


def test_float64_stays_float64():
    queries, keys, values = inputs(torch.float64, 1, 4)
    torch.testing.assert_close(attend(queries, keys, values), exact(queries, keys, values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("query_scale", "key_scale"), [(1, 1), (1, 10), (25, 100)])
def test_one_token_with_its_heads_side_by_side_is_as_exact_as_sdpa(dtype, query_scale, key_scale):
    queries, keys, values = inputs(dtype, query_scale, key_scale)
    expected = exact(queries, keys, values)
    packed = packed_attention(queries, keys, values, D**-0.5).transpose(1, 2).double()
    plain = scaled_dot_product_attention(queries, keys, values, scale=D**-0.5, enable_gqa=True).double()
    ours, theirs = ((each - expected).abs().max() for each in (packed, plain))
    assert ours <= 2 * theirs + HALF_ULP[dtype]
