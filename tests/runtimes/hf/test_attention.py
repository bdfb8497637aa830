"""One token's attention on a CPU, with the query heads of a KV head side by side."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf import layer as layers
from kvpolicy.runtimes.hf.attention import packed_attention, packs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "group", "dim", "value_dim"), [(1, 3, 3, 64, 64), (2, 2, 1, 8, 8), (3, 1, 4, 16, 24)]
)
def test_packed_heads_attend_like_single_ones(batch, heads, group, dim, value_dim, dtype):
    query = torch.randn(batch, heads * group, 1, dim, dtype=dtype)
    key = torch.randn(batch, heads, 40, dim, dtype=dtype)[:, :, :33]
    value = torch.randn(batch, heads, 40, value_dim, dtype=dtype)[:, :, :33]
    wanted = scaled_dot_product_attention(
        query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1), scale=0.3
    ).transpose(1, 2)
    got = packed_attention(query, key, value, 0.3)
    assert got.shape == (batch, 1, heads * group, value_dim)
    torch.testing.assert_close(got.double(), wanted, atol=1e-6 if dtype is torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("option", [{"dropout": 0.1}, {"softcap": 30.0}, {"output_attentions": True}])
def test_what_the_models_own_function_does_more_is_left_to_it(option):
    query = torch.zeros(1, 2, 1, 4)
    assert packs(sdpa_attention_forward, query, {"dropout": 0.0, "scaling": 0.5})
    assert not packs(sdpa_attention_forward, query, option)
    assert not packs(lambda *_: None, query, {})
    assert not packs(sdpa_attention_forward, query.to("meta"), {})


def test_only_single_tokens_of_rows_that_are_alike_are_packed(tiny, compose, random_prompts, padded, monkeypatch):
    shapes = []

    def spy(query, key, value, scale):
        shapes.append(tuple(query.shape))
        return packed_attention(query, key, value, scale)

    monkeypatch.setattr(layers, "packed_attention", spy)
    prompts = random_prompts(20, 11)
    for inputs, packed in ((padded(prompts), False), ({"input_ids": torch.tensor([prompts[0]] * 2)}, True)):
        shapes.clear()
        with PolicyCache(compose(budget=200), tiny()) as cache:
            tiny().generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert bool(shapes) == packed
        assert all(shape[2] == 1 for shape in shapes)
