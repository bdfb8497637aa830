"""Every registered policy and every switch of the bundled components, on a tiny Llama."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DynamicCache

import kvpolicy
from kvpolicy.runtimes.hf import PolicyCache, generate
from kvpolicy.testing.tables import stand_in_tables
from kvsupport.alone import as_if_alone
from kvsupport.audit import audit
from kvsupport.oracle import compare, knows
from kvsupport.trace import TracedCache


@pytest.fixture(autouse=True)
def _tables_of_any_model():
    """The shipped tables are of another model."""
    with stand_in_tables():
        yield


AUDITED = {
    "adakv-snapkv", "adaptive-rkv", "cam", "chunkkv", "dbtrim-kv", "defensivekv", "duo-attention", "finch", "headkv",
    "kvcrush", "kvzap", "lu-kv", "nacl", "pyramidkv", "qfilter", "rkv-pyramid", "rkv-regions", "think", "threshold",
    "triattention", "vase",
}  # fmt: skip


def _lengths(policy) -> tuple[int, ...]:
    """Lengths of prompts, shorter than the budget where the policy pins them."""
    pinned = any(type(part).__name__ == "Prompt" for part in policy.protections)
    return (5, 15, 9, 12) if pinned else (5, 31, 18, 40)


def _sampled(step_seed: int = 7):
    """Choose tokens by chance, for a greedy text of a tiny model soon repeats itself."""
    generators: dict[int, torch.Generator] = {}

    def choose(logits, step):
        generator = generators.setdefault(0, torch.Generator().manual_seed(step_seed))
        return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))

    return choose


def _traced(model, policy, inputs, tokens=60):
    with TracedCache(policy, model, outputs=True) as cache:
        cache.prefill_chunks(inputs["input_ids"], inputs["attention_mask"])
        model.generate(**inputs, do_sample=True, max_new_tokens=tokens, past_key_values=cache)
        cache.settled()
    return cache


def _check(cache, policy):
    report = compare(cache.trace, policy) if knows(policy) else audit(cache.trace, policy)
    print(policy.name, report)
    assert report.ok, report
    assert (report.decisions > 0) == (policy.budget.fraction != 1.0)
    assert len(report.accepted) <= report.near_ties  # an audit accepts nothing
    assert report.output_error < 1e-4
    return report


def test_registered_policies_keep_what_the_oracle_keeps(registered, tiny, small, random_prompts, padded):
    policy = small(registered)
    lengths = _lengths(policy)
    cache = _traced(tiny(), policy, padded(random_prompts(lengths[0], lengths[3])), tokens=70)
    _check(cache, policy)
    if policy.bound is not None:
        longest = 40 if policy.prefill_chunk is None else 0
        assert cache.stats().peak_resident <= max(policy.bound, longest + 1)


def test_the_oracle_knows_most_policies():
    """What it does not know is only audited here, and has references of its own in tests/plugins."""
    unknown = {e.name for e in kvpolicy.catalog().policies() if not knows(kvpolicy.load(e.name).build())}
    assert unknown <= AUDITED


def test_a_row_of_a_batch_behaves_as_if_alone(registered, tiny, small, random_prompts):
    policy = small(registered)
    report = as_if_alone(tiny(), policy, random_prompts(*_lengths(policy)), 64, choose=_sampled())
    print(registered, report)
    assert report.ok, report
    assert (report.decisions > 0) == (policy.budget.fraction != 1.0)
    assert len(report.accepted) <= report.near_ties


def test_below_the_budget_the_text_is_that_of_the_full_cache(registered, tiny, random_prompts, padded):
    model, inputs = tiny(), padded(random_prompts(5, 31, 18))
    wanted = model.generate(
        **inputs, do_sample=False, max_new_tokens=60, past_key_values=DynamicCache(config=model.config)
    )
    got, cache = generate(model, inputs, registered, do_sample=False, max_new_tokens=60)
    assert torch.equal(got, wanted)
    assert cache.stats().evicted == 0


WINDOW = {"use": "window_attention"}
ALONE = "importance_only"
TOP = {"use": "top_k"}
ROW = {"group": "mean", "group_stage": "weights", "softmax_over": "row"}
SWITCHES = {
    "observe more than is protected": {"importance": {**WINDOW, "observe": 12}},
    "observe one": {"importance": {**WINDOW, "observe": 1}},
    "mean of logits": {"importance": {**WINDOW, "group": "mean"}},
    "max of weights": {"importance": {**WINDOW, "group_stage": "weights"}},
    "row": {"importance": {**WINDOW, "softmax_over": "row"}},
    "snapkv": {"importance": {**WINDOW, **ROW, "smooth": 5, "smooth_kind": "mean_zero_padded"}, "mixer": ALONE},
    "mean smoothing": {"importance": {**WINDOW, "smooth": 5, "smooth_kind": "mean"}, "mixer": ALONE},
    "even smoothing by query": {"importance": {**WINDOW, "smooth": 6, "smooth_stage": "query"}},
    "mean smoothing by query": {"importance": {**WINDOW, "smooth": 4, "smooth_kind": "mean", "smooth_stage": "query"}},
    "no smoothing": {"importance": {**WINDOW, "smooth": 1}},
    "low threshold": {"redundancy": {"use": "key_cosine", "threshold": 0.1}},
    "three twins": {"redundancy": {"use": "key_cosine", "threshold": 0.2, "beta": 3}},
    "no twins": {"redundancy": {"use": "key_cosine", "beta": 0}},
    "own": {"redundancy": {"use": "key_cosine", "spare": "own", "beta": 2, "threshold": 0.3}},
    "index zero": {"redundancy": {"use": "key_cosine", "index_zero": True, "threshold": 0.6}},
    "index zero, own": {"redundancy": {"use": "key_cosine", "index_zero": True, "threshold": 0.6, "spare": "own"}},
    "window": {"redundancy": {"use": "key_cosine", "window": 8, "threshold": 0.3}},
    "before rope": {"redundancy": {"use": "key_cosine", "rope": "pre", "threshold": 0.3}},
    "redundancy alone": {"importance": "none", "mixer": {"use": "linear", "weight": 0.0}},
    "value norm": {"importance": "value_norm", "mixer": ALONE},
    "key norm, mixed": {"importance": "key_norm", "mixer": {"use": "linear", "weight": 0.5}},
    "ties": {"importance": "none", "mixer": ALONE},
    "random, mixed": {"importance": {"use": "random", "seed": 2**40 + 3}},
    "one set per layer, mean": {"selector": {**TOP, "scope": "layer"}},
    "one set per layer, max": {"selector": {**TOP, "scope": "layer", "reduce": "max"}},
    "one set per model, sum": {"selector": {**TOP, "scope": "model", "reduce": "sum"}},
    "one set per model, mean": {"selector": {**TOP, "scope": "model", "reduce": "mean"}, "importance": "value_norm"},
    "prompt": {"protect": {"prompt": True, "recent": 4}, "budget": 44},
    "pads and nothing else": {"protect": {"pads": True}},
    "aligned": {"trigger": {"use": "every", "interval": 6, "align": 4}},
    "each step": {"trigger": "each_step"},
    "fraction": {"budget": 0.3},
    "fraction, prompt": {"budget": 0.3, "protect": {"prompt": True, "recent": 4}},
    "prefill only": {"phase": "prefill", "prefill_chunk": 7},
    "prefill only, aligned": {
        "phase": "prefill", "prefill_chunk": 5, "trigger": {"use": "every", "interval": 2, "align": 4},
    },
    "both": {"phase": "both", "prefill_chunk": 7},
    "both, long chunks": {"phase": "both", "prefill_chunk": 19},
    "decode, chunks": {"phase": "decode", "prefill_chunk": 7},
    "both, accumulated": {
        "phase": "both", "prefill_chunk": 9, "importance": "accumulated_attention", "mixer": ALONE,
    },
    "accumulated, mixed, re-rotated": {"importance": "accumulated_attention", "post": ["rerotate"]},
    "re-rotated": {"post": ["rerotate"]},
    "re-rotated, before rope, both": {
        "post": ["rerotate"], "phase": "both", "prefill_chunk": 7, "redundancy": {"use": "key_cosine", "rope": "pre"},
    },
    "re-rotated, one set": {"post": ["rerotate"], "selector": {**TOP, "scope": "model"}, "trigger": "each_step"},
}  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_keep_what_the_oracle_keeps(switch, tiny, compose, random_prompts, padded):
    policy = compose(policy=switch.replace(",", "").replace(" ", "-"), **SWITCHES[switch])
    _check(_traced(tiny(), policy, padded(random_prompts(31, 9, 40)), tokens=40), policy)


@pytest.mark.parametrize(
    "switch", ["both, accumulated", "re-rotated, before rope, both", "aligned", "fraction", "prefill only, aligned"]
)
def test_switches_in_a_batch_behave_as_if_alone(switch, tiny, compose, random_prompts):
    report = as_if_alone(tiny(), compose(**SWITCHES[switch]), random_prompts(5, 31, 18, 40), 40, choose=_sampled())
    assert report.ok, report
    assert report.decisions > 0


def test_the_oracle_sees_a_difference(tiny, compose, random_prompts, padded):
    """A policy that is a little different is not taken for the same."""
    cache = _traced(tiny(), compose(), padded(random_prompts(31, 9)), tokens=30)
    changes = [
        {"mixer": {"use": "linear", "weight": 0.2}}, {"protect": {"sinks": 3, "recent": 8}}, {"trigger": {"every": 9}},
        {"importance": {**WINDOW, "smooth": 5}}, {"redundancy": {"use": "key_cosine", "threshold": 0.3}},
        {"budget": 25}, {"selector": {**TOP, "scope": "layer"}}, {"phase": "prefill"},
    ]  # fmt: skip
    for change in changes:
        assert not compare(cache.trace, compose(**change)).ok, change


def test_the_same_seed_keeps_the_same_and_another_does_not(tiny, compose, random_prompts):
    ids = torch.tensor(random_prompts(20))
    sets = []
    for seed in (1, 1, 2):
        policy = compose(importance={"use": "random", "seed": seed}, mixer="importance_only")
        with PolicyCache(policy, tiny()) as cache:
            tiny().generate(ids, do_sample=False, max_new_tokens=20, past_key_values=cache)
            sets.append([cache.kept(layer, head) for layer in range(3) for head in range(2)])
    assert sets[0] == sets[1] != sets[2]


@pytest.mark.parametrize("chunk", [5, 13])
def test_chunks_of_the_prompt_keep_what_one_shot_keeps(chunk, registered, tiny, small, random_prompts, padded):
    """A policy that compacts while decoding only does not notice how the prompt came in."""
    policy = small(registered)
    if any("decode" not in part.phases for part in policy.components):
        pytest.skip("compresses prompts only")
    policy = dataclasses.replace(policy, phase="decode")
    inputs, kept = padded(random_prompts(*_lengths(policy))), []
    for size in ("one shot", None, chunk):
        with PolicyCache(policy, tiny()) as cache:
            if size != "one shot":
                cache.prefill(inputs["input_ids"], inputs["attention_mask"], chunk=size)
            torch.manual_seed(0)
            text = tiny().generate(**inputs, do_sample=True, max_new_tokens=24, past_key_values=cache)
            kept.append([cache.kept(i, h, b) for i in range(3) for h in range(2) for b in range(4)])
            kept[-1].append(text.tolist())
    assert kept[0] == kept[1] == kept[2]
