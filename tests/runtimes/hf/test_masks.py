"""Masks of a model's own: tokens of an image see each other, and whatever else a model asks for."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache

IMAGE = 250
PICTURE = slice(5, 9)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    """Gemma-3 with a picture of four tokens, which see each other."""
    text = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 24, "initializer_range": 0.12,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 12,
        "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4}
    tokens = {"image_token_index": IMAGE, "boi_token_index": 251, "eoi_token_index": 252}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = transformers.Gemma3ForConditionalGeneration(config)
    made.set_attn_implementation(request.param)
    return made.eval()


@pytest.fixture
def conversation(random_prompts):
    """A prompt with a picture, three decoded tokens, and a second turn of text."""
    whole = torch.tensor(random_prompts(49))
    whole[:, PICTURE] = IMAGE
    return whole, torch.randn(1, 3, 16, 16)


def first_turn(model, cache, whole, pixels):
    types = (whole[:, :40] == IMAGE).long()
    model(whole[:, :40], pixel_values=pixels, token_type_ids=types, past_key_values=cache)
    for i in range(40, 43):
        model(whole[:, i : i + 1], past_key_values=cache)


def second_turn(model, cache, whole, types):
    more = {} if types is None else {"token_type_ids": types}
    return model(whole[:, 43:], past_key_values=cache, **more).logits


@torch.no_grad()
def test_a_turn_of_text_is_causal_whatever_earlier_tokens_are(model, compose, conversation):
    """The types of a second turn mark the picture of the first, as a processor makes them of the whole text."""
    whole, pixels = conversation
    types = (whole == IMAGE).long()
    policy = compose(budget=20, trigger={"every": 4}, protect={"recent": 4})
    logits = []
    for marks in (types, None):
        with PolicyCache(policy, model) as cache:
            first_turn(model, cache, whole, pixels)
            assert cache.stats().evicted > 0
            logits.append(second_turn(model, cache, whole, marks))
    torch.testing.assert_close(logits[0], logits[1])


@torch.no_grad()
def test_before_an_eviction_it_is_what_a_dynamic_cache_gives(model, compose, conversation):
    whole, pixels = conversation
    types = (whole == IMAGE).long()
    with PolicyCache(compose(budget=100), model) as cache:
        plain = DynamicCache(config=model.config)
        for each in (cache, plain):
            first_turn(model, each, whole, pixels)
        got, wanted = (second_turn(model, each, whole, types) for each in (cache, plain))
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_new_picture_after_an_eviction_is_refused(model, compose, conversation):
    whole, pixels = conversation
    types = (whole == IMAGE).long()
    types[:, -3:] = 1
    plain = []
    for marks in (types, None):
        cache = DynamicCache(config=model.config)
        first_turn(model, cache, whole, pixels)
        plain.append(second_turn(model, cache, whole, marks))
    if torch.equal(*plain):
        pytest.skip("this transformers looks at the types of a first pass only")
    with PolicyCache(compose(budget=20, trigger={"every": 4}, protect={"recent": 4}), model) as cache:
        first_turn(model, cache, whole, pixels)
        with pytest.raises(UnsupportedError, match="not simply causal"):
            second_turn(model, cache, whole, types)
