"""Rows that are selected and repeated, and text that is taken back, in `generate`."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.errors import CacheStateError
from kvpolicy.runtimes.hf import PolicyCache
from kvsupport.generating import ACCUMULATED, POLICIES
from kvsupport.oracle import compare
from kvsupport.trace import TracedCache


def decode(model, cache, ids):
    """Feed tokens `[1, n]` one by one."""
    for token in ids.split(1, 1):
        model(token, past_key_values=cache)


def test_rows_can_be_selected_and_repeated(tiny, compose, random_prompts, padded):
    """Selected rows behave as if they were alone."""
    model, policy = tiny(), compose(**ACCUMULATED)
    prompts = random_prompts(20, 31, 40)
    inputs = padded(prompts)
    with TracedCache(policy, model, outputs=True) as cache, torch.no_grad():
        model(**inputs, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([True, False, True]))
        cache.batch_repeat_interleave(2)
        mask = inputs["attention_mask"][[0, 0, 2, 2]]
        for step in range(20):
            mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
            new = torch.tensor([[step + 5], [step + 6], [step + 7], [step + 8]])
            model(new, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache)
        cache.settled()
    report = compare(cache.trace, policy)
    assert report.ok, report
    assert report.output_error < 1e-5
    assert cache.kept(0, 0, 0) != cache.kept(0, 0, 1)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_crop_takes_back_what_came_after_the_last_compaction(policy, tiny, compose, random_prompts):
    """Cropped and fed again, the cache is where it was."""
    model, policy = tiny(), compose(**{**policy, "trigger": {"every": 16}})
    [text] = random_prompts(60)
    ids = torch.tensor([text])
    logits: dict[str, list[torch.Tensor]] = {"straight": [], "cropped": []}
    kept = {}
    for way, made in logits.items():
        with TracedCache(policy, model, outputs=True) as cache, torch.no_grad():
            model(ids[:, :30], past_key_values=cache)
            for n in range(30, 60):
                if way == "cropped" and n in (30, 35, 50):
                    wrong = torch.full((1, 1), 99)
                    for _ in range(3):
                        model(wrong, past_key_values=cache)
                    cache.crop(-3 if n == 35 else n)  # by a number (5.23), to a length (5.2)
                    cache.crop(0)
                made.append(model(ids[:, n : n + 1], past_key_values=cache).logits)
            kept[way] = cache.settled()
        report = compare(cache.trace, policy)
        assert report.ok, report
    assert kept["straight"] == kept["cropped"]
    for one, other in zip(*logits.values(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@torch.no_grad()
def test_crop_behind_the_last_compaction_is_refused(tiny, compose, random_prompts):
    ids = torch.tensor(random_prompts(40))
    with PolicyCache(compose(), tiny()) as cache:
        tiny()(ids[:, :33], past_key_values=cache)
        tiny()(ids[:, 33:34], past_key_values=cache)
        cache.crop(-1)  # nothing has been compacted after the decode step
        tiny()(ids[:, 33:34], past_key_values=cache)
        tiny()(ids[:, 34:35], past_key_values=cache)
        cache.crop(-1)
        with pytest.raises(CacheStateError, match="the last compaction, which was at token 34 of 34; crop at most 0"):
            cache.crop(-1)
        with pytest.raises(CacheStateError, match="more than the 34"):
            cache.crop(-99)
        tiny()(ids[:, 34:35], past_key_values=cache)  # a refused crop changes nothing
        assert cache.get_seq_length() == 35


@torch.no_grad()
def test_crop_into_the_prompt(tiny, compose, random_prompts):
    """A crop can cut the prompt itself, more deeply than the queries that a policy remembers."""
    ids = torch.tensor(random_prompts(200))
    for policy in (compose(), compose(**ACCUMULATED)):
        with PolicyCache(policy, tiny()) as cache:
            tiny()(ids[:, :120], past_key_values=cache)
            cache.crop(-40)
            decode(tiny(), cache, ids[:, 80:100])
            kept = [cache.kept(i, h) for i in range(3) for h in range(2)]
        with PolicyCache(policy, tiny()) as cache:
            tiny()(ids[:, :80], past_key_values=cache)
            decode(tiny(), cache, ids[:, 80:100])
            assert kept == [cache.kept(i, h) for i in range(3) for h in range(2)]


@torch.no_grad()
def test_a_deep_crop_is_forgotten_after_a_few_steps(tiny, compose, random_prompts):
    """A crop may leave fewer queries than a policy looks at; they are there again before the next compaction."""
    ids = torch.tensor(random_prompts(120))
    policy = compose(trigger={"every": 40})
    with TracedCache(policy, tiny()) as cache:
        tiny()(ids[:, :20], past_key_values=cache)
        decode(tiny(), cache, ids[:, 20:60])
        cache.crop(-35)
        decode(tiny(), cache, ids[:, 25:90])
        cache.settled()
    report = compare(cache.trace, policy)
    assert report.ok, report
    assert report.decisions > 0


@torch.no_grad()
def test_a_compaction_never_looks_at_fewer_queries_than_the_policy_says(tiny, compose, random_prompts):
    """Sixteen steps can be taken back before a step of many tokens; deeper, some must be decoded one by one first."""
    ids = torch.tensor(random_prompts(120))
    policy = compose(trigger={"every": 40})
    with TracedCache(policy, tiny()) as cache:
        tiny()(ids[:, :20], past_key_values=cache)
        decode(tiny(), cache, ids[:, 20:60])
        with cache.fork() as deep:
            deep.crop(-35)
            with pytest.raises(CacheStateError, match="looks at the last 8 queries"):
                tiny()(ids[:, 25:90], past_key_values=deep)
        cache.crop(-16)
        tiny()(ids[:, 44:90], past_key_values=cache)
        tiny()(ids[:, 90:91], past_key_values=cache)
        cache.settled()
    report = compare(cache.trace, policy)
    assert report.ok, report
    assert report.decisions > 0
