"""A cache serves its own model; copies of it are forks, or refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import kvpolicy
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.tiny import tiny_model

GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def ids(random_prompts):
    return torch.tensor(random_prompts(40))[:1]


def _other_base():
    return tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 100.0})


def _deeper():
    return tiny_model("llama", num_hidden_layers=5)


def _twin():
    return copy.deepcopy(tiny_model("llama"))


@pytest.mark.parametrize("make", [_other_base, _deeper, _twin, lambda: tiny_model("qwen2")])
@pytest.mark.parametrize("attached", [True, False], ids=["attached", "plain"])
def test_a_cache_of_another_model_is_refused_and_stays_as_it_was(model, compose, ids, make, attached):
    other = make()
    with PolicyCache(compose(), model) as reference:
        expected = model.generate(ids, past_key_values=reference, **GREEDY)
    with PolicyCache(compose(), model) as cache:
        theirs = PolicyCache(compose(), other) if attached else None
        with pytest.raises(UnsupportedError, match=r"another model|not attached to the model"):
            other.generate(ids, past_key_values=cache, **GREEDY)
        if theirs is not None:
            theirs.close()
        assert cache.stats().seen == 0
        assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)


def test_models_that_share_a_configuration_share_no_cache(model, compose, ids):
    other = type(model)(model.config).eval()
    with PolicyCache(compose(), model) as cache, pytest.raises(UnsupportedError, match="another model"):
        other.generate(ids, past_key_values=cache, **GREEDY)


def test_a_refused_pass_of_another_model_does_not_reach_the_next_one(model, compose, ids):
    """The cache is asked for its sizes, and no mask of ours is made: the next mask belongs to somebody else."""
    other, mask = tiny_model("llama", seed=9), torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    batch = ids[:, :6].repeat(2, 1)
    with torch.no_grad(), PolicyCache(compose(), model) as cache:
        plain = model(batch, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits
        with pytest.raises(UnsupportedError):
            other(batch, attention_mask=mask, past_key_values=cache)
        assert torch.equal(model(batch, attention_mask=mask, use_cache=False).logits, plain)


class Wrapped(nn.Module):
    """A wrapper that hands everything on, as those of adapters and compilers do."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_parts_and_wrappers_of_a_model_are_the_model(model, compose, ids):
    with torch.no_grad(), PolicyCache(compose(), model) as reference:
        expected = model(ids, past_key_values=reference, output_hidden_states=True).hidden_states[-1]
    for part in (model.model, Wrapped(model.model), Wrapped(Wrapped(model.model))):
        with torch.no_grad(), PolicyCache(compose(), model) as cache:
            assert torch.equal(part(ids, past_key_values=cache).last_hidden_state, expected)


def test_modules_that_were_wrapped_after_the_cache_was_made_are_the_model(model, compose, ids):
    class Around(type(model.model.layers[0].self_attn)):
        pass

    with PolicyCache(compose(), model) as cache:
        old = model.model.layers[1].self_attn
        new = Around(model.config, 1)
        new.load_state_dict(old.state_dict())
        model.model.layers[1].self_attn = new.eval()
        model.generate(ids, past_key_values=cache, **GREEDY)
        assert cache.stats().seen == ids.shape[1] + 11


def _continued(model, cache, ids):
    with torch.no_grad():
        return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(12)], 1)


@pytest.mark.parametrize("policy", ["rkv", "adakv-snapkv", "full"])
def test_a_deep_copy_is_a_fork(model, ids, policy):
    spec = kvpolicy.load(policy) if policy == "full" else kvpolicy.load(policy, budget=33)
    with torch.no_grad(), PolicyCache(spec, model) as cache:
        model(ids, past_key_values=cache)
        one, two = copy.deepcopy(cache), cache.fork()
        assert one.model is model
        assert torch.equal(_continued(model, one, ids), _continued(model, two, ids))
        assert cache.get_seq_length() == ids.shape[1]
        assert one.kept(0, 0) == two.kept(0, 0)
        one.close()
        two.close()
        outputs = copy.deepcopy(model(ids[:, :1], past_key_values=cache))  # they hold the cache
        assert outputs.past_key_values.get_seq_length() == cache.get_seq_length()
        outputs.past_key_values.close()


def test_a_closed_cache_cannot_be_copied(model, compose):
    cache = PolicyCache(compose(), model)
    cache.close()
    with pytest.raises(CacheStateError, match=r"fork\(\) it before"):
        copy.deepcopy(cache)


@pytest.mark.parametrize(
    "way",
    [copy.copy, pickle.dumps, lambda c: torch.save(c, io.BytesIO()), lambda c: copy.deepcopy(c.layers)],
    ids=["copy", "pickle", "save", "layers"],
)
def test_other_copies_are_refused_by_what_to_do_instead(model, compose, ids, way):
    with torch.no_grad(), PolicyCache(compose(), model) as cache:
        model(ids, past_key_values=cache)
        with pytest.raises(UnsupportedError, match=r"fork\(\)"):
            way(cache)


@pytest.mark.parametrize(
    "policy", ["rkv", "streaming-llm", "g-kv", "expected-attention", "scissorhands", "adakv-snapkv", "full"]
)
@pytest.mark.parametrize("first", [True, False], ids=["inside-first", "outside-first"])
def test_inference_mode_may_be_entered_and_left_at_any_time(model, ids, policy, first):
    spec = kvpolicy.load(policy) if policy == "full" else kvpolicy.load(policy, budget=36)
    batch, mask = ids.repeat(2, 1), torch.ones(2, 40, dtype=torch.long)
    mask[1, :5] = 0

    def run(inside):
        """Feed, fork, reorder and crop; `inside[i]` says which parts run under inference mode."""
        with PolicyCache(spec, model) as cache:
            logits, seen = [], mask
            for part, columns in enumerate([40, 1, 1, 1, 3, 1, 1]):
                with torch.inference_mode(inside[part]), torch.no_grad():
                    seen = mask if columns == 40 else torch.cat([seen, seen.new_ones(2, columns)], 1)
                    logits.append(model(batch[:, :columns], attention_mask=seen, past_key_values=cache).logits)
                    if part == 2:
                        cache.reorder_cache(torch.tensor([1, 0]))
                        seen = seen[[1, 0]]
                    if part == 4:
                        cache.crop(-1)
                        seen = seen[:, :-1]
            with cache.fork() as twin, torch.no_grad():
                logits.append(model(batch[:, :1], past_key_values=twin).logits)
            return [x.clone() for x in logits], [cache.kept(1, 1, row) for row in (0, 1)]

    plain, mixed = run([False] * 7), run([first, first, not first, first, first, not first, first])
    assert plain[1] == mixed[1]
    assert all(torch.equal(a, b) for a, b in zip(plain[0], mixed[0], strict=True))
