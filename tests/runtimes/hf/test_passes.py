"""The cache knows what the tokens of a forward pass are: a prompt, a decode step, or candidates that are checked."""

from __future__ import annotations

import pytest
import torch

import kvpolicy
from kvpolicy.errors import CacheStateError
from kvpolicy.runtimes.hf import PolicyCache, caller
from kvpolicy.testing.tiny import tiny_model


class Noting(PolicyCache):
    """Notes (columns, kind) of every pass."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def update(self, keys, values, layer, *args, **kwargs):
        result = super().update(keys, values, layer, *args, **kwargs)
        if layer == 0:
            now = self._passes.current
            self.seen.append((now.columns, now.kind))
            assert self.engine.forward.kind == now.kind
        return result

    @property
    def kinds(self):
        return [kind for _, kind in self.seen]


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def cache(model, compose):
    with Noting(compose(), model) as cache:
        yield cache


@pytest.fixture
def ids(random_prompts):
    return torch.tensor(random_prompts(20))[:1]


@pytest.fixture
def looping():
    """A prompt that repeats itself, so that prompt lookup finds candidates."""
    return torch.arange(5, 12).repeat(6)[None]


@torch.no_grad()
def _feed(model, cache, ids):
    return model(ids, past_key_values=cache)


def test_several_tokens_are_a_prompt_and_one_is_a_decode_step(model, cache, ids):
    for part in (ids, ids[:, :1], ids[:, :5]):
        _feed(model, cache, part)
    assert cache.kinds == ["prompt", "decode", "prompt"]


def test_a_crop_of_nothing_does_nothing_to_the_next_turn(model, cache, ids):
    for tokens in (0, ids.shape[1]):  # to take back no token, and to cut to the length that there is
        _feed(model, cache, ids)
        _feed(model, cache, ids[:, :1])
        cache.crop(tokens + 1 if tokens else 0)
        _feed(model, cache, ids[:, :5])
        cache.reset()
    assert cache.kinds == ["prompt", "decode", "prompt"] * 2


def test_a_policy_of_prompts_compacts_the_next_turn_after_a_crop_of_nothing(model, ids):
    counts = []
    for cropped in (False, True):
        with torch.no_grad(), PolicyCache(kvpolicy.load("snapkv-prefill", budget=33), model) as cache:
            for part in (ids.repeat(1, 2), ids[:, :1], ids, ids[:, :1]):
                model(part, past_key_values=cache)
                if cropped:
                    cache.crop(0)
            counts.append((cache.stats().compactions, cache.stats().resident))
    assert counts[0] == counts[1]


def test_what_comes_after_tokens_were_taken_back_is_a_verification_once(model, cache, ids):
    _feed(model, cache, ids)
    _feed(model, cache, ids[:, :4])
    cache.crop(-2)
    _feed(model, cache, ids[:, :4])
    _feed(model, cache, ids[:, :4])
    assert cache.kinds == ["prompt", "prompt", "verify", "prompt"]


def test_a_fork_remembers_that_tokens_were_taken_back(model, cache, ids):
    _feed(model, cache, ids)
    cache.crop(-2)
    with cache.fork() as twin:
        _feed(model, twin, ids[:, :4])
        assert twin._passes.current.kind == "verify"


def test_the_caller_may_say_what_the_next_tokens_are(model, cache, ids):
    _feed(model, cache, ids)
    for kind, count in (("verify", 4), ("prompt", 1), ("decode", 3)):
        cache.expect(kind)
        _feed(model, cache, ids[:, :count])
    _feed(model, cache, ids[:, :1])
    assert cache.kinds == ["prompt", "verify", "prompt", "decode", "decode"]


def test_other_words_for_a_kind_are_refused(cache):
    with pytest.raises(CacheStateError, match="write one of prompt, decode, verify"):
        cache.expect("prefill")


@pytest.mark.parametrize("count", [2, 5])
def test_candidates_of_assisted_decoding_are_no_prompt_even_if_all_were_accepted(model, cache, looping, count):
    plain = model.generate(looping, max_new_tokens=24, do_sample=False)
    # A text that the model continues as it did before: every candidate is accepted.
    known = torch.cat([plain, looping[:, :3], plain[:, 3 : looping.shape[1] + 4]], 1)
    model.generate(
        known,
        past_key_values=cache,
        max_new_tokens=24,
        do_sample=False,
        prompt_lookup_num_tokens=count,
        eos_token_id=255,
    )
    wide = [kind for columns, kind in cache.seen[1:] if columns > 1]
    assert cache.kinds[0] == "prompt"
    assert wide
    assert set(wide) == {"verify"}


def test_accepted_candidates_are_followed_by_a_verification(model, looping, monkeypatch):
    """The pass after `crop` took nothing back, which is how assisted decoding says that all were accepted."""
    from transformers.generation import candidate_generator

    plain = model.generate(looping, max_new_tokens=30, do_sample=False)

    def oracle(self, input_ids, *args, **kwargs):
        return plain[:, : input_ids.shape[1] + 3], None

    monkeypatch.setattr(candidate_generator.PromptLookupCandidateGenerator, "get_candidates", oracle)
    lengths = []
    with Noting("full", model) as cache:
        original = cache.crop
        cache.crop = lambda tokens: (original(tokens), lengths.append(cache.get_seq_length()))
        out = model.generate(
            looping, past_key_values=cache, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3
        )
    assert torch.equal(out, plain[:, : out.shape[1]])
    assert lengths[:3] == [looping.shape[1] + 3 + 4 * n for n in range(3)]  # nothing was taken back
    assert cache.seen[:3] == [(looping.shape[1] + 3, "prompt"), (4, "verify"), (4, "verify")]


def test_the_turn_after_assisted_decoding_is_a_prompt(model, cache, looping):
    out = model.generate(
        looping, past_key_values=cache, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3, eos_token_id=255
    )
    _feed(model, cache, torch.cat([out[:, cache.get_seq_length() :], looping[:, :6]], 1))
    assert cache.kinds[-1] == "prompt"


def test_the_last_chunk_of_a_prompt_is_a_prompt_even_if_it_is_one_token(model, cache, ids):
    model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, prefill_chunk_size=ids.shape[1] - 1)
    assert cache.seen[:4] == [(ids.shape[1] - 1, "prompt"), (1, "prompt"), (1, "decode"), (1, "decode")]


def test_the_loops_of_transformers_have_the_names_that_are_looked_for():
    from transformers import GenerationMixin

    for name in caller._LOOPS:
        code = getattr(GenerationMixin, name).__code__
        assert "model_kwargs" in code.co_varnames
    assert "is_first_iteration" in GenerationMixin._assisted_decoding.__code__.co_varnames


def test_outside_of_generation_there_is_no_loop():
    assert caller.generation_loop() is None
