"""A recorder writes down what a policy really did: the same text, the same kept sets, the numbers that were ranked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.testing.tables import stand_in_tables
from kvpolicy.trace.recorder import Recorder
from kvpolicy.trace.running import record_generation, record_reading
from kvsupport.trace import TracedCache

NEW = 40


@pytest.fixture(autouse=True)
def _tables():
    """The shipped tables are of another model."""
    with stand_in_tables():
        yield


def generate(model, cache, prompt, new=NEW):
    ids = torch.tensor([prompt])
    cache.prefill_chunks(ids)
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False)[0].tolist()


def kept(recording, tokens, row):
    return np.flatnonzero(recording.held(tokens)[row]).tolist()


def places(recording):
    return [
        (layer, head) for layer, count in zip(recording.layers, recording.heads, strict=True) for head in range(count)
    ]


def test_every_policy_generates_the_same_and_the_record_is_what_the_cache_held(registered, tiny, small, random_prompts):
    policy = small(registered)
    pinned = any(type(part).__name__ == "Prompt" for part in policy.protections)
    model, (prompt,) = tiny(), random_prompts(15 if pinned else 30)
    with TracedCache(policy, model) as cache:
        expected = generate(model, cache, prompt)
        held = cache.settled()
        passes = cache.trace.passes
    recorder = Recorder()
    with PolicyCache(recorder.watch(policy), model) as cache:
        assert generate(model, cache, prompt) == expected
        recording = recorder.recording(cache)
    assert (recording.prompt, recording.seen) == (len(prompt), len(prompt) + NEW - 1)
    for row, (layer, head) in enumerate(places(recording)):
        assert kept(recording, recording.seen, row) == held[layer][0][head]
        seen = 0
        for each in passes:
            before, seen = seen, seen + each.valid.shape[1]
            # What a layer holds during a pass is what was left before it, and the new tokens.
            assert [p for p in each.layers[layer].held[0][head] if p < before] == kept(recording, before, row)
    everything = policy.budget.fraction == 1
    assert (len(recording.compactions) > 0) != everything
    for snapshot in recording.snapshots:
        assert np.isfinite(snapshot.retention[~snapshot.protected]).all()
        assert len(snapshot.retention) == recording.candidates(snapshot.compaction).sum()


class Noting(Policy):
    """A policy that keeps what it scored, computed once more for every layer alone."""

    log: list

    def decide(self, views, budget, *ranks):
        views = [views[i] for i in range(len(views))]
        one = {"importance": [], "redundancy": [], "retention": []}
        for view in views:
            scored, valid = self.scores(view), view.valid[0]
            for kind, parts in one.items():
                parts.append(getattr(scored, kind)[0][valid])
        self.log.append({kind: torch.cat(parts).numpy() for kind, parts in one.items()})
        return super().decide(views, budget, *ranks)


@pytest.mark.parametrize("name", ["rkv", "snapkv", "rkv-pyramid", "h2o", "adakv-snapkv", "streaming-llm"])
def test_recorded_scores_are_those_of_the_policy(name, tiny, small, random_prompts):
    model, (prompt,) = tiny("qwen3"), random_prompts(30)
    policy = small(name)
    noting = Noting(**{part: getattr(policy, part) for part in Policy.__dataclass_fields__})
    object.__setattr__(noting, "log", [])
    with PolicyCache(noting, model) as cache:
        generate(model, cache, prompt)
        cache.stats()
    _, recording = record_generation(model, {"input_ids": torch.tensor([prompt])}, policy, max_new_tokens=NEW)
    assert len(recording.snapshots) == len(noting.log) > (0 if policy.phase == "prefill" else 2)
    for snapshot, expected in zip(recording.snapshots, noting.log, strict=True):
        for kind, used in [
            ("importance", policy.mixer.uses_importance),
            ("redundancy", policy.mixer.uses_redundancy),
            ("retention", True),
        ]:
            got = getattr(snapshot, kind)
            assert (got is not None) == used
            if used:
                np.testing.assert_allclose(got, expected[kind], atol=1e-6, rtol=1e-5)


def test_what_is_kept_has_the_highest_retention(tiny, compose, random_prompts):
    model, (prompt,) = tiny(), random_prompts(50)
    _, recording = record_generation(model, {"input_ids": torch.tensor([prompt])}, compose(), max_new_tokens=NEW)
    for snapshot in recording.snapshots:
        retention, protected = (recording.scores(snapshot, kind) for kind in ("retention", "protected"))
        stays = recording.held(int(recording.compactions[snapshot.compaction - 1]))
        for row in range(len(stays)):
            there = ~np.isnan(retention[row])
            free = there & (protected[row] == 0)
            assert stays[row][there & (protected[row] == 1)].all()
            assert retention[row][free & stays[row]].min() >= retention[row][free & ~stays[row]].max()


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_heads_that_share_a_set_have_one_retention(scope, tiny, compose, random_prompts):
    model, (prompt,) = tiny(), random_prompts(50)
    policy = compose(selector={"use": "top_k", "scope": scope})
    _, recording = record_generation(model, {"input_ids": torch.tensor([prompt])}, policy, max_new_tokens=NEW)
    retention = recording.scores(recording.snapshots[-1], "retention")
    importance = recording.scores(recording.snapshots[-1], "importance")
    np.testing.assert_array_equal(retention[0], retention[1])
    assert not np.array_equal(importance[0], importance[1], equal_nan=True)
    assert np.array_equal(retention[0], retention[2], equal_nan=True) == (scope == "model")


def test_snapshots_are_bounded_and_evictions_are_not(tiny, small, random_prompts):
    model, (prompt,), policy = tiny(), random_prompts(30), small("h2o")
    inputs = {"input_ids": torch.tensor([prompt])}
    _, whole = record_generation(model, inputs, policy, max_new_tokens=NEW)
    _, few = record_generation(model, inputs, policy, snapshots=4, max_new_tokens=NEW)
    assert len(whole.compactions) == len(whole.snapshots) > 30
    assert 2 <= len(few.snapshots) <= 4
    np.testing.assert_array_equal(few.evicted, whole.evicted)
    for snapshot in few.snapshots:
        np.testing.assert_array_equal(snapshot.retention, whole.snapshots[snapshot.compaction - 1].retention)
    with pytest.raises(ValueError, match="at least 2"):
        Recorder(1)


@pytest.mark.parametrize("name", ["rkv", "h2o", "adakv-snapkv", "streaming-llm", "snapkv-prefill", "finch"])
def test_reading_a_text_is_as_generating_it(name, tiny, small, random_prompts):
    model, (prompt,), policy = tiny(), random_prompts(60), small(name)
    tokens, generated = record_generation(model, {"input_ids": torch.tensor([prompt])}, policy, max_new_tokens=NEW)
    steps = []
    read = record_reading(model, tokens[:-1], len(prompt), policy, step=steps.append)
    assert (read.prompt, read.seen) == (generated.prompt, generated.seen)
    assert steps[-1] == read.seen
    np.testing.assert_array_equal(read.compactions, generated.compactions)
    np.testing.assert_array_equal(read.evicted, generated.evicted)


def test_layers_without_eviction_are_left_out(tiny, small, random_prompts):
    model, (prompt,) = tiny("gemma3"), random_prompts(40)
    _, recording = record_generation(model, {"input_ids": torch.tensor([prompt])}, small("snapkv"), max_new_tokens=NEW)
    assert recording.layers == (1, 3)
    assert recording.evicted.shape == (4, 40 + NEW - 1)


def test_kept_for_counts_tokens(tiny, small, random_prompts):
    model, (prompt,) = tiny(), random_prompts(40)
    _, recording = record_generation(model, {"input_ids": torch.tensor([prompt])}, small("rkv"), max_new_tokens=NEW)
    spans = sum(recording.held(n).astype(int) for n in range(1, recording.seen + 1))
    # An entry is there when its token comes, and for all tokens but the one after which it went.
    np.testing.assert_array_equal(recording.kept_for(), spans + (recording.evicted > 0))


def test_one_text_and_one_cache(tiny, small, random_prompts, padded):
    model, prompts = tiny(), random_prompts(30, 25)
    for rows, error, match in [
        ([prompts[0]] * 2, UnsupportedError, "one text, and the batch has 2 rows"),
        (prompts, CacheStateError, "use a new recorder for each text"),  # its rows are not due together
    ]:
        with (
            pytest.raises(error, match=match),
            PolicyCache(Recorder().watch(small("rkv")), model) as cache,
        ):
            model.generate(**padded(rows), past_key_values=cache, max_new_tokens=NEW)
    recorder = Recorder()
    with PolicyCache(recorder.watch(small("rkv")), model) as cache:
        generate(model, cache, prompts[0])
        other = cache.fork()
        cache.reset()
        with pytest.raises(CacheStateError, match="use a new recorder for each text"):
            generate(model, cache, prompts[0])
        other.close()
    with pytest.raises(CacheStateError, match="has not made the"):
        recorder.recording(cache)
