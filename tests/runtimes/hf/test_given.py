"""A budget beside the policy, and what is refused in the place of a model, of tokens and of numbers."""

from __future__ import annotations

import pytest
import torch

import kvpolicy
from kvpolicy.errors import CacheStateError, KVPolicyError, SpecError, UnsupportedError
from kvpolicy.runtimes.hf import ContextCache, PolicyCache, generate


@pytest.fixture
def ids(random_prompts):
    return torch.tensor(random_prompts(20))


@pytest.mark.parametrize("budget", [256, 0.5, {"tokens": 256}])
def test_a_budget_beside_a_policy_is_that_of_load(budget, tiny):
    spec = kvpolicy.load("rkv", budget=budget)
    for policy in ("rkv", kvpolicy.load("rkv")):
        with PolicyCache(policy, tiny(), budget=budget) as cache:
            assert cache.policy == spec.build()
            assert cache.fork().policy == spec.build()


def test_the_other_doors_take_a_budget_too(tiny, ids, tokenizer):
    options = {"max_new_tokens": 30, "do_sample": False}
    spec = kvpolicy.load("sinks-recent", budget=24)
    wanted, cache = generate(tiny(), {"input_ids": ids}, spec, **options)
    got, same = generate(tiny(), {"input_ids": ids}, "sinks-recent", budget=24, **options)
    assert got.tolist() == wanted.tolist()
    assert same.stats() == cache.stats()
    assert cache.stats().compactions
    text = "a context " * 20
    with ContextCache("snapkv-prefill", tiny(), tokenizer, text, budget=0.5) as context:
        assert context.stats().resident == 101  # half of 202 tokens


@pytest.mark.parametrize("budget", [0, -4, 1.5, "many", True, [256], {"tokens": 4, "fraction": 0.5}])
def test_what_is_no_budget_is_refused(budget, tiny, ids):
    for door in (
        lambda: PolicyCache("rkv", tiny(), budget=budget),
        lambda: generate(tiny(), {"input_ids": ids}, "rkv", budget=budget),
    ):
        with pytest.raises(SpecError, match=r"^budget"):
            door()


def test_a_finished_policy_and_a_cache_have_a_budget(tiny, ids, small):
    with pytest.raises(SpecError, match="budget: a finished policy has one already; give a name, a path or a spec"):
        PolicyCache(small("rkv"), tiny(), budget=64)
    with (
        PolicyCache(small("rkv"), tiny()) as cache,
        pytest.raises(SpecError, match="budget: a PolicyCache has a policy with one already"),
    ):
        generate(tiny(), {"input_ids": ids}, cache, budget=64)


@pytest.mark.parametrize("model", ["smollm2", None, torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(model, ids):
    with pytest.raises(UnsupportedError, match=r"is no model of transformers; the order is PolicyCache\(policy, model"):
        PolicyCache("rkv", model)
    with pytest.raises(UnsupportedError, match=r"the order is generate\(model, inputs, policy"):
        generate(model, {"input_ids": ids}, "rkv")


def test_the_order_is_told_where_policy_and_model_are_swapped(tiny):
    with pytest.raises(UnsupportedError, match=r"model: str is no model of transformers; the order is PolicyCache"):
        PolicyCache(tiny(), "rkv")


def test_inputs_that_are_no_mapping_of_tensors_are_refused(tiny, ids):
    for inputs in (ids, "a text", [1, 2, 3]):
        with pytest.raises(UnsupportedError, match=r"inputs: \w+ is no mapping; give what the tokenizer returns"):
            generate(tiny(), inputs, "rkv", max_new_tokens=2)
    for tokens in (ids.tolist(), ids[0], "a text"):
        with pytest.raises(CacheStateError, match="input_ids: should be a tensor of token ids"):
            generate(tiny(), {"input_ids": tokens}, "rkv", max_new_tokens=2)


@pytest.mark.parametrize("number", ["512", 2.5, True, [4]])
def test_numbers_that_are_none_are_refused(number, tiny, ids, tokenizer, small):
    with PolicyCache(small("snapkv-prefill"), tiny()) as cache:
        for door in (cache.prefill, cache.read):
            with pytest.raises(CacheStateError, match=r"chunk: .* is no whole number; write one of at least 1"):
                door(ids, chunk=number)
    with ContextCache(small("snapkv-prefill"), tiny(), tokenizer, "a context " * 20) as context:
        for name in ("max_new_tokens", "batch"):
            with pytest.raises(CacheStateError, match=f"{name}: .* is no whole number"):
                context.ask("why?", **{name: number})


def test_a_mask_of_images_that_is_no_tensor_is_refused(tiny, small):
    with PolicyCache(small("rkv"), tiny()) as cache:
        for images in ([[True]], torch.ones(1, 4), torch.ones(4, dtype=torch.bool)):
            with pytest.raises(KVPolicyError, match=r"set_modality: a mask of .* says nothing; give booleans"):
                cache.set_modality(images)
