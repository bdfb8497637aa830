"""Every family of models: as the native implementation below the budget, as the oracle above it."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import DynamicCache, Qwen2VLForConditionalGeneration

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.tiny import FAMILIES, tiny_model
from kvsupport.alone import as_if_alone
from kvsupport.families import attentions, served
from kvsupport.oracle import compare
from kvsupport.trace import TracedCache

CASES = [(family, attention) for family in FAMILIES if served(family) for attention in attentions(family)]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_below_the_budget_a_model_writes_what_it_does_natively(
    family, attention, tiny, compose, random_prompts, padded
):
    inputs = padded(random_prompts(20, 11))
    native = tiny_model(family, attention="eager")
    wanted = native.generate(
        **inputs, do_sample=False, max_new_tokens=40, past_key_values=DynamicCache(config=native.config)
    )
    model = tiny(family, attention)
    with PolicyCache(compose(budget=100), model) as cache:
        got = model.generate(**inputs, do_sample=False, max_new_tokens=40, past_key_values=cache)
        assert cache.stats().evicted == 0
    assert torch.equal(got, wanted)
    assert len(set(got[0, 20:].tolist())) > 5, "the text is too uniform to prove anything"


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_above_the_budget_a_model_keeps_what_the_oracle_keeps(family, attention, tiny, compose, random_prompts, padded):
    model = tiny(family, attention)
    with TracedCache(compose(), model, outputs=True) as cache:
        model.generate(**padded(random_prompts(20, 11)), do_sample=True, max_new_tokens=40, past_key_values=cache)
        cache.settled()
    report = compare(cache.trace, cache.policy)
    print(family, report)
    assert report.ok, report
    assert report.decisions >= 2 * 2 * 2 * 3
    assert report.output_error < 1e-5


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "gemma3", "phi3", "qwen2_vl"])
def test_accumulated_attention_honours_sinks_soft_caps_and_scales(family, tiny, compose, random_prompts, padded):
    model = tiny(family, "eager")
    policy = compose(importance="accumulated_attention", mixer="importance_only")
    with TracedCache(policy, model) as cache:
        model.generate(**padded(random_prompts(20, 11)), do_sample=True, max_new_tokens=30, past_key_values=cache)
        cache.settled()
    report = compare(cache.trace, policy)
    assert report.ok, report
    assert report.decisions > 0


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3", "gpt_oss", "glm4", "smollm3"])
def test_keys_are_turned_as_the_model_turns_them(family, tiny, compose, random_prompts, padded):
    policy = compose(redundancy={"use": "key_cosine", "rope": "pre"}, post=["rerotate"])
    model = tiny(family, "eager")
    with TracedCache(policy, model, outputs=True) as cache:
        model.generate(**padded(random_prompts(20, 11)), do_sample=True, max_new_tokens=30, past_key_values=cache)
        cache.settled()
    report = compare(cache.trace, policy)
    assert report.ok, report
    assert report.output_error < 1e-4


@pytest.mark.parametrize("family", ["llama", "glm4", "gpt_oss", "without positions"])
def test_turned_keys_give_what_a_fresh_text_of_the_kept_tokens_gives(family, tiny, compose, random_prompts):
    """Keys of a first layer depend on nothing but their token: the cache equals a new text of the tokens it holds."""
    options = {"gpt_oss": {"layer_types": ["full_attention"]}, "without positions": {"no_rope_layers": [0]}}
    name = "smollm3" if family == "without positions" else family
    model = tiny_model(name, num_hidden_layers=1, **options.get(family, {}))
    policy = compose(
        budget=12, trigger="each_step", importance="recency", mixer="importance_only", post=["rerotate"],
        protect={"sinks": 4}, phase="both",
    )  # fmt: skip
    [text] = random_prompts(60)
    ids = torch.tensor([text])
    with PolicyCache(policy, model) as cache, torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        for n in range(20, 59):
            logits = model(ids[:, n : n + 1], past_key_values=cache).logits[0, -1]
            held = [*range(4), *range(n - 8, n + 1)]
            fresh = model(ids[:, held]).logits[0, -1]
            assert torch.allclose(logits, fresh, atol=1e-4), n
            assert cache.kept(0, 0) == [p for p in held if p != n - 8]


def test_a_rotation_that_is_not_known_is_refused(compose, monkeypatch):
    """What the configuration says about frequencies is held against what the model does."""
    model = tiny_model("llama")
    rotary = type(model.model.rotary_emb)
    forward = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda self, x, position_ids: forward(self, x, position_ids * 3))
    with pytest.raises(UnsupportedError, match="turns the keys of layer 0 in a way that kvpolicy does not know"):
        PolicyCache(compose(post=["rerotate"]), model)
    PolicyCache(compose(), model).close()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", [{}, {"importance": "accumulated_attention"}, {"importance": "recency"}])
def test_half_precision_keeps_what_the_oracle_keeps(dtype, fields, compose, random_prompts, padded):
    """Scores are computed in fp32 from what the cache holds."""
    model = tiny_model("llama").to(dtype)
    policy = compose(**fields)
    with TracedCache(policy, model) as cache:
        model.generate(**padded(random_prompts(20, 31)), do_sample=True, max_new_tokens=30, past_key_values=cache)
        cache.settled()
        assert cache.layers[0].keys.dtype == dtype
    report = compare(cache.trace, policy)
    assert report.ok, report
    assert report.decisions > 0


def test_layers_that_forget_anyway_are_left_alone(tiny, compose, random_prompts):
    model = tiny("gemma3")
    with TracedCache(compose(), model) as cache:
        model.generate(torch.tensor(random_prompts(20)), do_sample=False, max_new_tokens=30, past_key_values=cache)
        assert [layer.layer_idx for layer in cache.stats().layers] == [1, 3]
        assert cache.layers[0].keys.shape[2] == 11  # the sliding window, less the token to come


def test_a_row_of_a_batch_behaves_as_if_alone_beside_other_kinds_of_layers(tiny, compose, random_prompts):
    for family in ("gemma3", "gpt_oss", "qwen3_next"):
        if served(family):
            report = as_if_alone(tiny(family), compose(), random_prompts(5, 31, 18, 40), 30)
            assert report.ok, (family, report)
            assert report.decisions > 0


def test_a_mask_that_no_layer_uses_does_no_harm(compose, random_prompts):
    """Gemma-2 makes a sliding mask even when all its layers are full."""
    model = tiny_model("gemma2", attention="eager", layer_types=["full_attention"] * 3)
    with TracedCache(compose(), model, outputs=True) as cache:
        model.generate(torch.tensor(random_prompts(20)), do_sample=False, max_new_tokens=30, past_key_values=cache)
    report = compare(cache.trace, cache.policy)
    assert report.ok, report
    assert report.output_error < 1e-5


@pytest.fixture
def picture() -> dict[str, torch.Tensor]:
    """A prompt of 24 tokens, 4 of them an image of 4 x 4 patches that are merged two by two."""
    generator = torch.Generator().manual_seed(5)
    before = torch.randint(3, 240, (9,), generator=generator).tolist()
    after = torch.randint(3, 240, (9,), generator=generator).tolist()
    ids = torch.tensor([[*before, 252, *[250] * 4, 253, *after]])
    kinds = {"mm_token_type_ids": (ids == 250).long()}  # transformers 5.2 finds the image by its token
    accepted = inspect.signature(Qwen2VLForConditionalGeneration.forward).parameters
    return {
        **({} if "mm_token_type_ids" not in accepted else kinds),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def test_an_image_in_the_prompt(tiny, compose, picture):
    native, model = tiny_model("qwen2_vl", attention="eager"), tiny("qwen2_vl")
    wanted = native.generate(**picture, do_sample=False, max_new_tokens=30)
    with PolicyCache(compose(budget=100), model) as cache:
        got = model.generate(**picture, do_sample=False, max_new_tokens=30, past_key_values=cache)
    assert torch.equal(got, wanted)
    with TracedCache(compose(), model, outputs=True) as cache:
        model.generate(**picture, do_sample=False, max_new_tokens=30, past_key_values=cache)
        cache.settled()
    report = compare(cache.trace, cache.policy)
    assert report.ok, report
    assert report.decisions > 0
    assert report.output_error < 1e-5
