"""Rotary embeddings of models that keep them elsewhere, or that say nothing of some of their layers."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf.rope import _matching, layer_ropes
from kvpolicy.testing.tiny import tiny_model

FAMILIES = ["llama", "gemma3", "glm4", "smollm3"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("buffers", [False, True])
def test_an_offloaded_model_has_the_same_embedding(family, buffers):
    """Also when the frequencies themselves, which are a buffer, lie elsewhere until a module runs."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model(family)
    layers = [1, 3] if family == "gemma3" else [0, 1, 2]
    expected = layer_ropes(model, layers)
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=buffers)
    found = layer_ropes(model, layers)
    for layer in layers:
        assert torch.equal(found[layer].inv_freq, expected[layer].inv_freq)
        assert found[layer].interleaved == expected[layer].interleaved


# transformers 5.2 takes the place of an offloaded parameter for that of the model.
@pytest.mark.filterwarnings("ignore:You are calling .generate")
@pytest.mark.parametrize("parts", [{"post": ["rerotate"]}, {"redundancy": "key_density"}])
def test_an_offloaded_model_keeps_what_it_keeps_otherwise(parts, compose, random_prompts):
    accelerate = pytest.importorskip("accelerate")
    ids = torch.tensor(random_prompts(60))
    results = []
    for offloaded in (True, False):
        model = tiny_model("llama")
        if offloaded:
            accelerate.cpu_offload(model, execution_device="cpu")
        with PolicyCache(compose(**parts), model) as cache:
            text = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False).tolist()
            results.append((text, [cache.kept(layer, head) for layer in range(3) for head in range(2)]))
    assert results[0] == results[1]


@pytest.mark.parametrize("entries", [{"full_attention": None}, {}])
def test_a_kind_of_layers_that_the_configuration_says_nothing_of(entries):
    model = tiny_model("llama")
    expected = layer_ropes(model, [0])[0]
    model.config.layer_types = ["full_attention"] * 3
    model.config.rope_parameters = {"sliding_attention": {"rope_type": "dynamic", "rope_theta": 1e4}, **entries}
    assert torch.equal(layer_ropes(model, [0])[0].inv_freq, expected.inv_freq)
    model.config.rope_parameters["full_attention"] = {"rope_type": "dynamic", "rope_theta": 1e4}
    with pytest.raises(UnsupportedError, match="'dynamic' rotary embeddings"):
        layer_ropes(model, [0])


def test_keys_that_do_not_turn_need_no_frequencies():
    keys = torch.randn(1, 2, 1, 16).expand(2, -1, -1, -1)
    found = _matching(keys, None, "Model", 4)
    assert not found.inv_freq.any()
    with pytest.raises(UnsupportedError, match="Model turns the keys of layer 4 in a way"):
        _matching(torch.randn(2, 2, 1, 16), None, "Model", 4)
