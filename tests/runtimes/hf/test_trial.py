"""A model that does not attend to what it stores is refused when the cache is made, by its true reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.tiny import tiny_model
from kvsupport.shrinking import CAUSAL, IMAGE_TEXT, tiny_of
from kvsupport.sweep import sweep

CASES = {
    "deepseek_v3": "layer 0 does not hand the keys that it stores.*latent attention",
    "minicpm3": "layer 0 does not hand the keys that it stores",
    "jetmoe": "layer 0 does not hand the keys that it stores",
    "diffllama": "layer 0 does not attend to the values as it stores them|does not take its attention",
    "minimax": "MiniMax uses cache of its own|keeps a .*Cache.*Layer|no attention of its own",
    "bloom": "layer 0 has no attention of its own that goes through",
    "bigbird_pegasus": "the attention of layer 0 is not causal by itself",
    "diffusion_gemma": "the attention of layer 3 is not causal by itself",
    "blt": "transformers cannot make a DynamicCache",
    "mamba": "no layer to evict from|cannot make a DynamicCache|no attention of its own",
}


if transformers.__version__.startswith("5.2."):
    del CASES["deepseek_v3"]  # stores there what it has expanded, and is served


@pytest.mark.parametrize("family", [family for family in CASES if family in {*CAUSAL, *IMAGE_TEXT}])
def test_what_cannot_be_served_is_refused_at_construction(family, compose):
    model = tiny_of(family)
    before = getattr(model.config, "_attn_implementation", None)
    with pytest.raises(UnsupportedError, match=CASES[family]) as caught:
        PolicyCache(compose(), model)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert getattr(model.config, "_attn_implementation", None) == before


def test_a_model_is_tried_once_and_left_as_it_was(compose):
    model = tiny_model("llama")
    passes = []
    model.register_forward_hook(lambda *_: passes.append(model.training))
    model.train()
    PolicyCache(compose(), model).close()
    assert passes == [False]
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    model.eval()
    with PolicyCache(compose(), model) as cache:
        cache.fork().close()
    assert passes == [False]


def test_the_positions_behind_an_image_are_left_as_they_were(compose):
    model = tiny_model("qwen2_vl")
    model.model.rope_deltas = torch.tensor([[-7]])
    PolicyCache(compose(), model).close()
    assert model.model.rope_deltas.tolist() == [[-7]]


@torch.no_grad()
def test_a_cache_in_use_does_not_notice_that_its_model_is_tried(compose, random_prompts):
    model = tiny_model("llama")
    [ids] = torch.tensor([random_prompts(30)])
    wanted = model(ids).logits[0, 20:]
    plain = DynamicCache(config=model.config)
    model(ids[:, :20], past_key_values=plain)
    with PolicyCache(compose(), model):
        got = model(ids[:, 20:], past_key_values=plain).logits[0]
    assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"is_decoder": False}),
        ("roberta", {"is_decoder": False}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
    ],
)
def test_an_encoder_is_refused(family, changes, compose):
    with pytest.raises(UnsupportedError, match=r"is not causal by itself|each token sees all others"):
        PolicyCache(compose(), tiny_of(family, **changes))


@pytest.mark.parametrize("family", ["bart", "whisper"])
def test_a_decoder_whose_layers_could_also_attend_to_an_encoder_is_served(family):
    """Both attentions of a layer have its number; the one that stores keys is the causal one."""
    outcome = sweep(tiny_of(family), ["rkv"])
    assert (outcome.served, outcome.faults) == (["rkv"], [])


@torch.no_grad()
def test_what_an_encoder_made_is_refused_when_it_comes(compose):
    """The attention to it would store its keys beside those of the text."""
    model = tiny_of("bart")
    ids = torch.arange(3, 20)[None]
    with (
        PolicyCache(compose(), model) as cache,
        pytest.raises(UnsupportedError, match=r"layer 0 brings keys twice .* leave out what the encoder made"),
    ):
        model(ids, encoder_hidden_states=torch.randn(1, 7, model.config.d_model), past_key_values=cache)
