"""What cannot be supported is refused, in one sentence that says what to do."""

from __future__ import annotations

import re
from functools import partial
from typing import ClassVar

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvpolicy import ImportanceScorer, catalog
from kvpolicy.errors import BudgetError, CacheStateError, KVPolicyError, UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache, generate
from kvpolicy.testing.tiny import tiny_model


@pytest.fixture
def refused():
    """Check that something raises an error of ours whose message is one sentence with a way out."""

    def check(error, pattern, action):
        with pytest.raises(error) as caught:
            action()
        message = str(caught.value)
        assert isinstance(caught.value, KVPolicyError)
        assert re.search(pattern, message), message
        assert message.endswith(".")
        assert "\n" not in message
        assert not re.search(r"[.!?] [A-Z]", message), message
        return message

    return check


@pytest.fixture
def ids(random_prompts):
    return torch.tensor(random_prompts(20))


@pytest.mark.parametrize("name", ["quantized", "offloaded", "static", "offloaded_static"])
def test_other_caches_by_name(name, refused, compose, ids, tiny):
    model = tiny_model("llama")
    refused(UnsupportedError, name, lambda: generate(model, {"input_ids": ids}, compose(), cache_implementation=name))
    model.generation_config.cache_implementation = name
    refused(UnsupportedError, f"generation_config.*'{name}'", lambda: PolicyCache(compose(), model))
    assert model.config._attn_implementation == "sdpa"


def test_another_cache_as_an_object(refused, compose, ids, tiny):
    cache = DynamicCache(config=tiny().config)
    refused(
        UnsupportedError,
        "a DynamicCache follows no policy",
        lambda: generate(tiny(), {"input_ids": ids}, compose(), past_key_values=cache),
    )


def test_an_encoder_decoder(refused, compose):
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    refused(
        UnsupportedError,
        "T5ForConditionalGeneration is an encoder-decoder",
        lambda: PolicyCache(compose(), transformers.T5ForConditionalGeneration(config)),
    )


@pytest.mark.parametrize("name", ["paged|sdpa", "sdpa_paged"])
def test_attention_implementations_that_are_not_supported(name, refused, compose):
    model = tiny_model("llama")
    model.config._attn_implementation_internal = name
    refused(UnsupportedError, f"{re.escape(name)}.*load the model with", lambda: PolicyCache(compose(), model))
    assert model.config._attn_implementation_internal == name


def test_a_model_without_an_evictable_layer(refused, compose):
    model = tiny_model("gemma3", layer_types=["sliding_attention"] * 4)
    refused(UnsupportedError, "full-attention layers", lambda: PolicyCache(compose(), model))
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    refused(UnsupportedError, "MambaForCausalLM", lambda: PolicyCache(compose(), mamba))


def test_a_model_that_bypasses_the_attention_registry(refused, compose):
    """Bloom computes its attention itself."""
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2))
    refused(UnsupportedError, "Bloom", lambda: PolicyCache(compose(), model))


def test_a_model_without_rotary_embeddings_and_a_policy_that_turns_keys(refused, compose):
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    refused(UnsupportedError, "no rotary embedding", lambda: PolicyCache(compose(post=["rerotate"]), model))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_change_and_a_policy_that_turns_keys(kind, refused, compose):
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    model = tiny_model("phi3" if kind == "longrope" else "llama", rope_parameters=parameters)
    refused(UnsupportedError, f"'{kind}' rotary", lambda: PolicyCache(compose(post=["rerotate"]), model))
    PolicyCache(compose(), model).close()


def test_positions_in_several_dimensions_and_a_policy_that_turns_keys(refused, compose, tiny):
    refused(UnsupportedError, "several dimensions", lambda: PolicyCache(compose(post=["rerotate"]), tiny("qwen2_vl")))


class Telepathic(ImportanceScorer):
    """Asks for something that only a serving engine knows."""

    needs: ClassVar[frozenset[str]] = frozenset({"token_ids"})

    def score(self, view):
        raise NotImplementedError


def test_a_need_that_is_not_served(refused, compose, tiny):
    catalog().register("telepathic", Telepathic)
    try:
        policy = compose(importance="telepathic", mixer="importance_only", policy="mind-reader")
    finally:
        catalog().unregister("importance", "telepathic")
    refused(UnsupportedError, "'mind-reader' needs token_ids", lambda: PolicyCache(policy, tiny()))


def test_gradients(refused, compose, tiny, ids):
    with PolicyCache(compose(), tiny()) as cache:
        refused(UnsupportedError, "no_grad", lambda: tiny()(ids, past_key_values=cache))
        cache.reset()
        with torch.no_grad():
            tiny()(ids, past_key_values=cache)


@torch.no_grad()
def test_a_mask_that_is_shorter_than_what_was_seen(refused, compose, tiny, ids):
    with PolicyCache(compose(), tiny()) as cache:
        tiny()(ids, past_key_values=cache)
        short = torch.ones(1, 5, dtype=torch.long)
        refused(
            CacheStateError,
            "5 columns.*seen 20 and 1 more.*21 columns",
            lambda: tiny()(ids[:, :1], attention_mask=short, past_key_values=cache),
        )
        whole = torch.ones(1, 21, dtype=torch.long)
        tiny()(ids[:, :1], attention_mask=whole, past_key_values=cache)  # nothing was broken
        assert cache.stats().seen == 21


@torch.no_grad()
def test_a_mask_that_shows_what_was_padding(refused, compose, tiny, random_prompts, padded):
    inputs = padded(random_prompts(10, 6))
    with PolicyCache(compose(), tiny()) as cache:
        tiny()(**inputs, past_key_values=cache)
        refused(
            CacheStateError,
            "padding before",
            lambda: tiny()(
                inputs["input_ids"], attention_mask=torch.ones(2, 20, dtype=torch.long), past_key_values=cache
            ),
        )


@torch.no_grad()
def test_another_batch_size(refused, compose, tiny, ids):
    with PolicyCache(compose(), tiny()) as cache:
        tiny()(ids, past_key_values=cache)
        refused(
            CacheStateError,
            "holds 1 rows but the forward pass has 2",
            lambda: tiny()(ids[:, :1].repeat(2, 1), past_key_values=cache),
        )
        tiny()(ids[:, :1], past_key_values=cache)
        assert cache.stats().seen == 21


@torch.no_grad()
def test_a_mask_of_four_dimensions(refused, compose, tiny, ids):
    mask = torch.zeros(1, 1, 20, 20)
    with PolicyCache(compose(), tiny()) as cache:
        refused(UnsupportedError, "mask", lambda: tiny()(ids, attention_mask=mask, past_key_values=cache))


@torch.no_grad()
def test_a_pinned_prompt_that_is_longer_than_the_budget(refused, compose, tiny, random_prompts):
    ids = torch.tensor(random_prompts(40))
    policy = compose(protect={"prompt": True})
    with PolicyCache(policy, tiny()) as cache:
        message = refused(
            BudgetError,
            "24 entries per head are fewer than the 40",
            lambda: tiny().generate(ids, do_sample=False, max_new_tokens=20, past_key_values=cache),
        )
        assert "prompt" in message


@torch.no_grad()
def test_scores_that_are_not_finite(refused, compose, tiny, ids):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.k_proj.weight.data.fill_(float("nan"))
    with PolicyCache(compose(), model) as cache:
        refused(
            KVPolicyError,
            "layer 1 are not finite",
            lambda: model.generate(ids, do_sample=False, max_new_tokens=30, past_key_values=cache),
        )


@torch.no_grad()
def test_questions_about_what_is_not_there(refused, compose, tiny, ids):
    model = tiny("gemma3")
    with PolicyCache(compose(), model) as cache:
        refused(CacheStateError, "no layer 1", lambda: cache.kept(1, 0))
        model(ids, past_key_values=cache)
        assert cache.kept(1, 0) == list(range(20))
        for at in ((0, 0, 0), (1, 2, 0), (1, -1, 0), (1, 0, 1), (9, 0, 0)):
            refused(CacheStateError, "no layer {}, head {}, row {}".format(*at), partial(cache.kept, *at))


@torch.no_grad()
def test_prefill_of_what_was_seen(refused, compose, tiny, ids):
    with PolicyCache(compose(prefill_chunk=7), tiny()) as cache:
        cache.prefill(ids)
        assert cache.get_seq_length() == 13
        refused(CacheStateError, "already seen 13 tokens and the prompt has 10", lambda: cache.prefill(ids[:, :10]))
        refused(CacheStateError, "0 is not a chunk size", lambda: cache.prefill(ids, chunk=0))


def test_a_policy_that_is_none(refused, tiny):
    refused(KVPolicyError, "policy", lambda: PolicyCache(DynamicCache(config=tiny().config), tiny()))
    with pytest.raises(KVPolicyError, match="Did you mean 'rkv'"):
        PolicyCache("rkw", tiny())
