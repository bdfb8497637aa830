"""What a cache with `graph` does with what cannot be one graph: right, or one sentence."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import StaticCache

from kvpolicy.errors import CacheStateError, SpecError, UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.tiny import tiny_model

TOKEN = torch.tensor([[7]])


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(call):
    return torch.compile(call, fullgraph=True, dynamic=False, backend="eager")


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def prompt(random_prompts):
    return torch.tensor(random_prompts(20))


@pytest.mark.parametrize(
    ("name", "graph", "error", "words"),
    [
        ("adakv-snapkv", True, UnsupportedError, "length_is_counted"),
        ("full", True, UnsupportedError, "no bound.*graph=4096"),
        ("rkv", 31, SpecError, "write True, or at least 32"),
        ("rkv", 0, SpecError, "write True"),
        ("full", -4, SpecError, "at least 1"),
        ("rkv", "yes", SpecError, "'yes' is no number"),
        ("rkv", None, SpecError, "None is no number"),
        ("rkv", 64.0, SpecError, "64.0 is no number"),
    ],
)
def test_policies_and_sizes_that_make_no_fixed_arena(name, graph, error, words, model, small):
    with pytest.raises(error, match=words):
        PolicyCache(small(name), model, graph=graph)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(("family", "words"), [("gemma3", "SlidingWindow")])
def test_models_with_layers_that_grow(family, words, tiny, small):
    with pytest.raises(UnsupportedError, match=f"graph: layer 0 of .*{words}"):
        PolicyCache(small("rkv"), tiny(family), graph=True)


def test_a_changed_batch_size_is_refused_as_ever(model, prompt, small):
    with torch.no_grad(), PolicyCache(small("rkv"), model, graph=True) as cache:
        step = compiled(model.forward)
        model(prompt, past_key_values=cache)
        step(TOKEN, past_key_values=cache)
        for call in (step, model):
            with pytest.raises(CacheStateError, match="holds 1 rows but the forward pass has 2"):
                call(TOKEN.repeat(2, 1), past_key_values=cache)
        step(TOKEN, past_key_values=cache)  # and goes on
        assert cache.get_seq_length() == 22


def test_crops_between_compiled_steps_are_right(model, prompt, small):
    results = []
    for graph in (False, True):
        with torch.no_grad(), PolicyCache(small("rkv"), model, graph=graph) as cache:
            step = compiled(model.forward) if graph else model
            model(prompt, past_key_values=cache)
            for i in range(30):
                logits = step(TOKEN + i, past_key_values=cache).logits
                if i % 7 == 3:
                    cache.crop(-2)
            results.append((logits.argmax(-1).tolist(), cache.kept(0, 0), cache.kept(2, 1)))
            with pytest.raises(CacheStateError, match="lies before the last compaction"):
                cache.crop(-30)
    assert results[0] == results[1]


def test_a_compiled_prompt_or_a_step_that_nobody_opened_is_refused(model, prompt, small):
    with torch.no_grad(), PolicyCache(small("rkv"), model, graph=True) as cache:
        whole, part = compiled(model.forward), compiled(model.model.forward)
        with pytest.raises(Exception, match=r"brings one token per row, and cache.begin_step\(\)"):
            whole(prompt, past_key_values=cache)
        cache.reset()
        with pytest.raises(CacheStateError, match="no step to begin"):
            cache.begin_step()
        model(prompt, past_key_values=cache)
        with pytest.raises(Exception, match=r"brings one token per row, and cache.begin_step\(\)"):
            part(TOKEN, past_key_values=cache)
        for _ in range(3):
            cache.begin_step()
            part(TOKEN, past_key_values=cache)
        assert cache.get_seq_length() == 23
        with pytest.raises(Exception, match=r"brings one token per row, and cache.begin_step\(\)"):
            part(TOKEN, past_key_values=cache)


def test_a_step_that_was_opened_and_not_run_is_taken_back(model, prompt, small):
    with torch.no_grad(), PolicyCache(small("rkv"), model, graph=True) as cache:
        model(prompt, past_key_values=cache)
        cache.begin_step()
        assert cache.get_seq_length() == 20
        with pytest.raises(CacheStateError, match="opened and no forward pass"):
            cache.stats()
        assert cache.stats().seen == 20
        cache.begin_step()
        with pytest.raises(CacheStateError, match="opened and no forward pass"):
            model(prompt, past_key_values=cache)
        model(TOKEN, past_key_values=cache)
        assert cache.kept(0, 0) == list(range(21))


def test_rows_that_sit_a_step_out_are_right_as_it_is_and_refused_in_a_graph(model, random_prompts, padded, small):
    inputs, results = padded(random_prompts(20, 11)), []
    for graph in (False, True):
        with torch.no_grad(), PolicyCache(small("rkv"), model, graph=graph) as cache:
            model(**inputs, past_key_values=cache)
            shown = inputs["attention_mask"]
            for i in range(20):
                shown = torch.cat([shown, torch.tensor([[1], [i % 3]]).clamp(max=1)], 1)
                places = (shown.cumsum(1) - 1).clamp(min=0)[:, -1:]
                logits = model(
                    TOKEN.repeat(2, 1) + i, attention_mask=shown, position_ids=places, past_key_values=cache
                ).logits
            results.append((logits[0].argmax(-1).tolist(), cache.kept(0, 0, 0), cache.kept(0, 0, 1)))
            if graph:
                hidden = torch.cat([shown, torch.tensor([[1], [0]])], 1)
                with pytest.raises(Exception, match="steps with padding, with the model as it is"):
                    compiled(model.forward)(TOKEN.repeat(2, 1), attention_mask=hidden, past_key_values=cache)
    assert results[0] == results[1]


def test_a_finished_mask_is_refused(model, prompt, small):
    with torch.no_grad(), PolicyCache(small("rkv"), model, graph=True) as cache:
        model(prompt, past_key_values=cache)
        with pytest.raises(UnsupportedError, match="4-D"):
            model(TOKEN, attention_mask=torch.ones(1, 1, 1, 21, dtype=torch.bool), past_key_values=cache)


def test_forward_is_wrapped_for_as_long_as_a_cache_is_attached(model, prompt, small):
    with PolicyCache(small("rkv"), model) as plain:
        assert "forward" not in vars(model)
        first, second = PolicyCache(small("rkv"), model, graph=True), PolicyCache(small("rkv"), model, graph=True)
        first.close()
        assert "forward" in vars(model)
        twin = copy.deepcopy(model)
        assert twin.forward.__self__ is twin
        assert pickle.loads(pickle.dumps(model)).config.to_dict() == model.config.to_dict()
        with torch.no_grad():
            model(prompt, past_key_values=plain)  # other caches notice nothing
            with pytest.raises(UnsupportedError, match="made for another model"):
                twin.forward(prompt[:, :1], past_key_values=_filled(second, model, prompt))
            static = StaticCache(config=model.config, max_cache_len=40)
            expected = model(prompt, past_key_values=static).logits
            step = compiled(model.forward)
            assert torch.isfinite(step(TOKEN, past_key_values=static).logits).all()
            torch.testing.assert_close(expected, model(prompt).logits)
        second.close()
        assert "forward" not in vars(model)


def _filled(cache, model, prompt):
    model(prompt, past_key_values=cache)
    return cache
