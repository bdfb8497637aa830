"""The promises of the runtime on a real model: SmolLM2-135M-Instruct in fp32."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy.runtimes.hf import generate
from kvpolicy.testing.alone import as_if_alone
from kvpolicy.testing.oracle import compare
from kvpolicy.testing.trace import TracedCache

QUESTIONS = [
    "Hi.",
    "Explain why the sky is blue, in three sentences.",
    "Write a story about a fox who learns to count. The fox lives in a wood near a river; its best friend is an owl.",
    "List the planets.",
]


@pytest.fixture(scope="module")
def prompts(smollm2):
    tokenizer = smollm2[1]
    found = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        found.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert len({len(prompt) for prompt in found}) == len(found)
    return found


def _greedy(smollm2, prompt, policy, tokens):
    """Return the text under a policy, or with the full cache, and the cache."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if policy is not None:
        return generate(smollm2[0], inputs, policy, **options)
    cache = DynamicCache(config=smollm2[0].config)
    return smollm2[0].generate(**inputs, past_key_values=cache, **options), cache


@pytest.mark.parametrize("name", ["rkv", "h2o", "snapkv"])
def test_a_row_of_a_batch_behaves_as_if_alone(name, smollm2, prompts, small):
    policy = small(name, 48, 16)
    report = as_if_alone(smollm2[0], policy, prompts, 64)
    print(name, report)
    assert report.ok, report
    assert report.decisions >= 4 * 2 * 30 * 3


def test_below_the_budget_the_text_is_that_of_the_full_cache(smollm2, prompts):
    wanted, _ = _greedy(smollm2, prompts[1], None, 64)
    got, cache = _greedy(smollm2, prompts[1], "rkv", 64)
    assert torch.equal(got, wanted)
    assert cache.stats().evicted == 0


def test_the_oracle_agrees(smollm2, prompts, small):
    """A short look at what the slow test of 1,100 tokens does at length."""
    policy = small("rkv", 48, 16)
    with TracedCache(policy, smollm2[0]) as cache:
        ids = torch.tensor([prompts[2]])
        smollm2[0].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=48,
            min_new_tokens=48,
            past_key_values=cache,
        )
        cache.settled()
    report = compare(cache.trace, policy)
    print(report)
    assert report.ok, report
    assert report.decisions >= 3 * 90


@pytest.fixture(scope="module")
def full_text(smollm2, prompts):
    """300 tokens with the full cache."""
    return _greedy(smollm2, prompts[1], None, 300)[0]


@pytest.mark.slow
def test_below_the_budget_every_policy_writes_the_text_of_the_full_cache(registered, smollm2, prompts, full_text):
    got, cache = _greedy(smollm2, prompts[1], registered, 300)
    assert torch.equal(got, full_text)
    assert cache.stats().evicted == 0


def _budget(name):
    """A policy that compresses the prompt alone needs less than the shortest prompt to have anything to decide."""
    return 24 if kvpolicy.load(name).phase == "prefill" else 96


@pytest.mark.slow
def test_a_row_of_a_batch_behaves_as_if_alone_under_every_policy(registered, smollm2, prompts, small):
    policy = small(registered, _budget(registered), 32)
    report = as_if_alone(smollm2[0], policy, prompts, 300)
    print(registered, report)
    assert report.ok, report
    assert report.decisions > 0


@pytest.mark.slow
def test_every_policy_keeps_what_the_oracle_keeps(registered, smollm2, prompts, small):
    policy = small(registered, _budget(registered), 32)
    with TracedCache(policy, smollm2[0]) as cache:
        generate(
            smollm2[0], {"input_ids": torch.tensor([prompts[2]])}, cache, do_sample=False, max_new_tokens=100,
            min_new_tokens=100,
        )  # fmt: skip
        cache.settled()
    report = compare(cache.trace, policy)
    print(registered, report)
    assert report.ok, report


@pytest.mark.slow
def test_rkv_over_1100_tokens(smollm2, prompts):
    """No head ever holds more than budget and interval, and the kept positions are the oracle's."""
    policy = kvpolicy.load("rkv", budget=256, trigger__interval=128).build()
    with TracedCache(policy, smollm2[0]) as cache:
        ids = torch.tensor([prompts[2]])
        smollm2[0].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=1100,
            min_new_tokens=1100,
            past_key_values=cache,
        )
        cache.settled()
        stats = cache.stats()
    assert stats.peak_resident == 384
    for done in cache.trace.passes:
        assert all(noted.held.shape[2] <= 384 for noted in done.layers.values())
    entry = 2 * 3 * 64 * 4
    assert stats.bytes_allocated == 30 * 384 * entry
    report = compare(cache.trace, policy)
    print(report)
    assert report.ok, report
    assert report.decisions == 90 * ((len(prompts[2]) + 1099 - 256) // 128)
