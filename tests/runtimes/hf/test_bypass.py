"""A model that does not feed its cache as announced is refused, and by the true cause."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache, generate
from kvpolicy.runtimes.hf.naming import passing
from kvpolicy.testing.tiny import tiny_model
from kvsupport.families import attentions

GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def ids(random_prompts):
    return torch.tensor(random_prompts(20))


def _by_generation_config(model):
    model.generation_config.use_cache = False
    return {}


def _by_config(model):
    model.config.use_cache = model.generation_config.use_cache = False
    return {}


def _by_call(model):
    return {"use_cache": False}


def _by_beams(model):
    return {"use_cache": False, "num_beams": 2}


@pytest.mark.parametrize("how", [_by_generation_config, _by_config, _by_call, _by_beams])
@pytest.mark.parametrize("length", [1, 20])
def test_generation_that_feeds_the_text_again_is_refused_before_anything_is_stored(model, compose, ids, how, length):
    options = how(model)
    with PolicyCache(compose(), model) as cache:
        with pytest.raises(UnsupportedError, match="use_cache=True"):
            model.generate(ids[:, :length], past_key_values=cache, **GREEDY, **options)
        assert cache.stats().seen == 0
        model.generate(ids[:1, :length], past_key_values=cache, use_cache=True, **GREEDY)
        assert cache.stats().seen == length + 4


def test_a_padded_batch_without_a_cache_is_refused_by_the_same_cause(model, compose, ids):
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with PolicyCache(compose(), model) as cache, pytest.raises(UnsupportedError, match="use_cache=True"):
        model.generate(ids, attention_mask=mask, past_key_values=cache, use_cache=False, **GREEDY)


def test_a_single_pass_may_say_use_cache_false(model, compose, ids):
    """The model hands its cache on all the same, and nothing is fed again."""
    model.config.use_cache = False
    with torch.no_grad(), PolicyCache(compose(), model) as cache:
        model(ids, past_key_values=cache, use_cache=False)
        model(ids[:, :1], past_key_values=cache, use_cache=False)
        assert cache.stats().seen == 21


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradient_checkpointing_is_refused_in_training_mode_only(compose, ids, name):
    model = tiny_model(name, attention=attentions(name)[-1])
    enable = "activation_checkpointing_enable"  # before 5.23: gradient_checkpointing_enable
    getattr(model, enable, model.gradient_checkpointing_enable)()
    with PolicyCache(compose(), model) as cache:
        model.train()
        with torch.no_grad(), pytest.raises(UnsupportedError, match=r"gradient checkpointing.*model.eval"):
            model(ids, past_key_values=cache)
        model.eval()
        model.generate(ids, past_key_values=cache, **GREEDY)
        assert cache.stats().seen == 24


def _drop_the_cache(model):
    """Let the layers be called without the cache that the mask was made for, as a wrapper might."""
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, **passing(None, module.forward)}), with_kwargs=True
        )


def test_a_pass_at_which_no_layer_came_by_is_an_error_at_the_next_one(model, compose, ids):
    cache = PolicyCache(compose(), model)
    _drop_the_cache(model)
    with pytest.raises(CacheStateError, match="20 tokens and no layer stored any"):
        model.generate(ids, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize(
    "read",
    [
        PolicyCache.stats,
        PolicyCache.check,
        PolicyCache.fork,
        lambda cache: cache.kept(0, 0),
        lambda cache: cache.__exit__(None, None, None),
    ],
    ids=["stats", "check", "fork", "kept", "exit"],
)
def test_a_pass_at_which_no_layer_came_by_is_an_error_at_any_read(model, compose, ids, read):
    cache = PolicyCache(compose(), model)
    _drop_the_cache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(CacheStateError, match="no layer stored any"):
        read(cache)


def test_an_interrupted_pass_is_an_error_once(model, compose, ids):
    def interrupt(module, args):
        raise KeyboardInterrupt

    with torch.no_grad(), PolicyCache(compose(), model) as cache:
        handle = model.model.layers[0].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache)
        handle.remove()
        with pytest.raises(CacheStateError, match="interrupted"):
            cache.stats()
        model(ids, past_key_values=cache)
        assert cache.stats().seen == 20


def test_what_the_cache_refused_is_no_interrupted_pass(model, compose, ids):
    with torch.no_grad(), PolicyCache(compose(), model) as cache:
        model(ids, past_key_values=cache)
        with pytest.raises(CacheStateError, match="rows"):
            model(ids.repeat(2, 1), past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        assert cache.stats().seen == 21


def test_an_attention_that_failed_is_named(model, compose, ids, monkeypatch):
    from kvpolicy.runtimes.hf.layer import EvictingLayer

    original = EvictingLayer._learn

    def fail(self, *args):
        if self.layer_idx == 1:
            raise MemoryError
        return original(self, *args)

    with torch.no_grad(), PolicyCache(compose(), model) as cache:
        monkeypatch.setattr(EvictingLayer, "_learn", fail)
        with pytest.raises(MemoryError):
            model(ids, past_key_values=cache)
        monkeypatch.undo()
        with pytest.raises(CacheStateError, match=r"attention of layer 1.*reset\(\)"):
            cache.stats()
        cache.reset()
        model(ids, past_key_values=cache)
        assert cache.stats().seen == 20


def test_generate_notices_a_model_that_leaves_its_cache_alone(model, compose, ids):
    PolicyCache(compose(), model).close()  # it does not when it is tried
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, **passing(None, module.forward)}), with_kwargs=True
    )
    with pytest.raises(UnsupportedError, match="did not use the cache"):
        generate(model, {"input_ids": ids}, compose(), **GREEDY)


def test_an_empty_cache_has_no_rows_to_move(model, compose, ids):
    with PolicyCache(compose(), model) as cache:
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_select_indices(torch.tensor([0]))
        cache.batch_select_indices(torch.tensor([True, False]))
        cache.batch_repeat_interleave(3)
        cache.crop(0)
        model.generate(ids, past_key_values=cache, **GREEDY)
        assert cache.stats().seen == 24
