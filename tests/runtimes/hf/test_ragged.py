"""Policies that give heads or layers different counts, in a real model: exact, bounded, and freed."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.cache.store import BLOCK
from kvpolicy.runtimes.hf import PolicyCache
from kvsupport.alone import as_if_alone
from kvsupport.audit import audit
from kvsupport.families import attentions, served
from kvsupport.trace import TracedCache

WINDOW = {"importance": {"use": "window_attention", "observe": 4, "group_stage": "weights"}, "mixer": "importance_only"}
POLICIES = {
    "heads": {**WINDOW, "allocator": "adaptive_heads"},
    "layers": {**WINDOW, "allocator": "pyramid", "protect": {"recent": 4}},
    "pool": {**WINDOW, "allocator": {"use": "global_pool", "normalise": "z_score"}},
    "memory": {"importance": "accumulated_attention", "mixer": "importance_only", "allocator": "adaptive_heads"},
}


@pytest.fixture
def ragged(compose):
    return lambda name, **fields: compose(**{**POLICIES[name], **fields})


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
@pytest.mark.parametrize("name", POLICIES)
def test_counts_are_exact_and_the_attention_is_too(name, phase, ragged, tiny, random_prompts, padded):
    policy = ragged(name, phase=phase)
    inputs = padded(random_prompts(40, 9, 31))
    with TracedCache(policy, tiny(), outputs=True) as cache:
        tiny().generate(**inputs, do_sample=True, max_new_tokens=40, past_key_values=cache)
        cache.settled()
    report = audit(cache.trace, policy)
    print(report)
    assert report.ok, report
    assert report.evictions > 0
    assert report.output_error < 1e-4
    counts = {len(cache.kept(i, h, 0)) for i in range(3) for h in range(2)}
    assert len(counts) > 1, "all heads hold as many: this shows nothing"


FAMILIES = [family for family in ("gemma2", "gpt_oss", "gemma3", "glm4", "qwen3_next") if served(family)]


@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_soft_caps_sinks_and_other_layers(family, ragged, tiny, random_prompts, padded):
    policy = ragged("heads", phase="both")
    model = tiny(family, attentions(family)[-1])
    with TracedCache(policy, model, outputs=True) as cache:
        model.generate(**padded(random_prompts(40, 17)), do_sample=False, max_new_tokens=30, past_key_values=cache)
        cache.settled()
    report = audit(cache.trace, policy)
    assert report.ok, report
    assert report.evictions > 0
    assert report.output_error < 1e-4


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", POLICIES)
def test_a_row_is_as_if_alone(name, phase, ragged, tiny, random_prompts):
    report = as_if_alone(tiny(), ragged(name, phase=phase), random_prompts(31, 9, 40), 40)
    print(report)
    assert not report.mismatches, report.mismatches
    assert report.logit_error < 1e-3


@pytest.mark.parametrize("name", POLICIES)
def test_bytes_are_those_of_the_counts(name, ragged, tiny, random_prompts):
    ids = random_prompts(60)
    with PolicyCache(ragged(name, phase="prefill"), tiny()) as cache:
        tiny().generate(torch.tensor(ids), do_sample=False, max_new_tokens=21, past_key_values=cache)
        stats = cache.stats()
    entry, heads = 2 * 16 * 4, 3 * 2
    held = sum(len(cache.kept(i, h)) for i in range(3) for h in range(2))
    assert held == 24 * heads + 20 * heads
    assert stats.bytes_resident == held * entry
    tensors = [cache.engine.stores[i] for i in range(3)]
    measured = sum(t.keys[t.index[i]].nbytes + t.values[t.index[i]].nbytes for i, t in enumerate(tensors))
    measured += sum(t.bases[i].arenas[kind].nbytes for i, t in enumerate(tensors) for kind in ("keys", "values"))
    assert stats.bytes_allocated == measured
    # Less than a block for the base of each head, and less than one for its tail.
    assert held * entry <= measured < (held + 2 * BLOCK * heads) * entry


def test_decoding_stays_bounded(ragged, tiny, random_prompts):
    policy = ragged("heads")
    most = 0
    with torch.no_grad(), PolicyCache(policy, tiny()) as cache:
        ids = torch.tensor(random_prompts(12))
        tiny()(ids, past_key_values=cache)
        for step in range(300):
            tiny()(torch.tensor([[3 + step % 200]]), past_key_values=cache)
            layers = [cache.engine.stores[i] for i in range(3)]
            tails = cache.engine.held(slice(None)).lengths
            most = max(most, sum(sum(s.entries(i, tails)) for i, s in enumerate(layers)))
        stats = cache.stats()
    assert most == policy.bound * 6
    assert stats.compactions > 30
    assert stats.peak_resident == policy.bound


def test_rows_forks_crops_and_resets(ragged, tiny, random_prompts):
    model, policy = tiny(), ragged("heads")
    prompts = torch.tensor(random_prompts(20, 20))
    steps = torch.randint(3, 250, (2, 30))

    def run(cache, rows, tokens):
        return torch.stack(
            [model(tokens[rows, t, None], past_key_values=cache).logits[:, -1] for t in range(tokens.shape[1])]
        )

    with torch.no_grad(), PolicyCache(policy, model) as cache:
        model(prompts, past_key_values=cache)
        run(cache, [0, 1], steps[:, :20])
        twin = cache.fork()
        expected = run(cache, [0, 1], steps[:, 20:])
        twin.reorder_cache(torch.tensor([1, 0]))
        swapped = run(twin, [1, 0], steps[:, 20:])
        torch.testing.assert_close(swapped, expected.flip(1), atol=1e-5, rtol=1e-4)
        room = min(cache.engine.held(slice(None)).lengths) - 1
        assert room > 0, "the last compaction is too near for a crop"
        cache.crop(-room)
        again = run(cache, [0, 1], steps[:, 30 - room :])
        torch.testing.assert_close(again, expected[-room:], atol=1e-5, rtol=1e-4)
        cache.reset()
        model(prompts, past_key_values=cache)
        run(cache, [0, 1], steps[:, :20])
        torch.testing.assert_close(run(cache, [0, 1], steps[:, 20:]), expected, atol=1e-5, rtol=1e-4)


def test_several_tokens_at_once_after_a_compaction(ragged, tiny, random_prompts):
    """A second turn in one piece is as token by token, for what is older than both is the same."""
    model, policy = tiny(), ragged("heads", phase="prefill", trigger={"every": 64})
    first, second = torch.tensor(random_prompts(100)), torch.tensor(random_prompts(6))
    with torch.no_grad():
        outputs = []
        for pieces in ([second], second.split(1, 1)):
            with PolicyCache(policy, model) as cache:
                model(first, past_key_values=cache)
                logits = [model(piece, past_key_values=cache).logits for piece in pieces]
                assert cache.stats().compactions == 1
            outputs.append(torch.cat(logits, 1))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
