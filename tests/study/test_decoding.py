from __future__ import annotations

import pytest
import torch

import kvpolicy
from kvpolicy import KVPolicyError
from kvpolicy.runtimes.hf import PolicyCache, generate
from kvpolicy.study.choosing import choose, row_key
from kvpolicy.study.decoding import PromptRow, generate_batch
from kvpolicy.study.sampling import Sampling
from kvpolicy.testing.tiny import tiny_model

ENDS = {5, 6}
POLICIES = {
    "rkv": {"budget": 48, "trigger__every": 16},
    "h2o": {"budget": 80, "trigger__every": 8},
    "random": {"budget": 24, "trigger__every": 16},
    "full": {},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3").double()


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    lengths = (20, 33, 20, 41, 7)
    return [PromptRow(torch.randint(7, 256, (n,), generator=generator).tolist(), 0, i) for i, n in enumerate(lengths)]


def told(answer):
    """All that an answer says, but its time."""
    usage = answer.usage.metrics()
    del usage["seconds"]
    return answer.tokens, usage


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=80), Sampling(max_new_tokens=40, temperature=1.0, top_p=0.9)]
)
def test_a_batch_gives_what_each_row_gives_alone(model, rows, name, sampling):
    policy = kvpolicy.load(name, **POLICIES[name]).build()
    alone = [told(generate_batch(model, policy, [row], sampling, ENDS)[0]) for row in rows]
    assert [told(a) for a in generate_batch(model, policy, rows, sampling, ENDS)] == alone
    order = [3, 0, 4, 1, 2]
    assert [told(a) for a in generate_batch(model, policy, [rows[i] for i in order], sampling, ENDS)] == [
        alone[i] for i in order
    ]
    lengths = {len(tokens) for tokens, _ in alone}
    assert len(lengths) > 1  # rows end at different times


def test_it_generates_what_generate_generates(model, rows):
    policy = kvpolicy.load("rkv", **POLICIES["rkv"]).build()
    answers = generate_batch(model, policy, rows, Sampling(max_new_tokens=90), ENDS)
    for row, answer in zip(rows, answers, strict=True):
        inputs = {"input_ids": torch.tensor([row.prompt])}
        output, cache = generate(model, inputs, policy, max_new_tokens=90, do_sample=False, eos_token_id=list(ENDS))
        assert output[0, len(row.prompt) :].tolist() == answer.tokens
        assert cache.stats().peak_resident == answer.usage.peak


def test_what_rows_hold_is_counted(model, rows):
    policy = kvpolicy.load("rkv", 48, trigger__every=16).build()
    answer = generate_batch(model, policy, rows[:1], Sampling(max_new_tokens=101), ())[0]
    with torch.inference_mode(), PolicyCache(policy, model) as cache:
        held = []
        for step, token in enumerate([rows[0].prompt, *answer.tokens[:-1]]):
            model(torch.tensor([token if step == 0 else [token]]), past_key_values=cache, use_cache=True)
            held.append(cache.engine.rows[0].resident)
        size = cache.stats().bytes_resident // cache.stats().resident
    metrics = answer.usage.metrics()
    assert len(answer.tokens) == 101
    assert metrics["resident_mean"] == pytest.approx(sum(held[1:]) / 100)
    assert metrics["resident_peak"] == max(held) == 64
    assert metrics["retained_fraction"] == pytest.approx(sum(held[1:]) / sum(range(21, 121)))
    assert metrics["bytes_peak"] == size * 64
    assert metrics["seconds"] > 0


def test_the_prompt_comes_in_the_policys_chunks(model, rows):
    policy = kvpolicy.load("rkv", 16, trigger__every=4, phase="both", prefill_chunk=8).build()
    answers = generate_batch(model, policy, rows, Sampling(max_new_tokens=5), ())
    assert answers[3].usage.peak <= 24
    assert [a.tokens for a in answers] == [
        generate_batch(model, policy, [row], Sampling(max_new_tokens=5), ())[0].tokens for row in rows
    ]


# -- sampling ---------------------------------------------------------------------------------------------------------


def draw(logits, count, **settings):
    many = logits.expand(count, -1)
    steps = range(count)
    return choose(many, Sampling(**{"temperature": 1.0, **settings}), [1] * count, [row_key("p")] * count, list(steps))


def test_sampling_follows_the_distribution():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    found = torch.bincount(draw(p.log()[None], 20000), minlength=4) / 20000
    assert (found - p).abs().max() < 0.015
    sharp = torch.bincount(draw(p.log()[None], 20000, temperature=0.5), minlength=4) / 20000
    assert (sharp - p**2 / (p**2).sum()).abs().max() < 0.015


def test_top_p_leaves_the_rest_out():
    p = torch.tensor([[0.05, 0.3, 0.5, 0.15]])
    assert set(draw(p.log(), 3000, top_p=0.8).tolist()) == {1, 2}
    assert set(draw(p.log(), 3000, top_p=0.81).tolist()) == {1, 2, 3}
    assert set(draw(p.log(), 300, top_p=1e-6).tolist()) == {2}


def test_the_noise_depends_on_seed_problem_and_step():
    logits = torch.zeros(1, 1000)
    same = Sampling(temperature=1.0)

    def one(seed, key, step):
        return choose(logits, same, [seed], [key], [step]).item()

    assert one(0, 1, 2) == one(0, 1, 2)
    assert len({one(0, 1, 2), one(1, 1, 2), one(0, 2, 2), one(0, 1, 3)}) == 4


def test_greedy_takes_the_largest_and_damaged_logits_are_refused():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert choose(logits, Sampling(), [0, 0], [0, 0], [0, 0]).tolist() == [1, 0]
    logits[1, 2] = float("nan")
    with pytest.raises(KVPolicyError, match="the model's logits are not finite"):
        choose(logits, Sampling(), [0, 0], [0, 0], [0, 0])


def test_answers_end_at_the_models_last_position_and_longer_prompts_are_refused(rows):
    model = tiny_model("llama", max_position_embeddings=45).double()
    policy = kvpolicy.load("rkv", budget=30, trigger__every=4, importance__observe=4).build()
    answers = generate_batch(model, policy, rows, Sampling(max_new_tokens=30), ())
    assert [len(answer.tokens) for answer in answers] == [25, 12, 25, 4, 30]
    with pytest.raises(KVPolicyError, match="prompt: makes a text of 45 tokens, and the model has 45 positions; give"):
        generate_batch(model, policy, [*rows, PromptRow([7] * 45)], Sampling(max_new_tokens=30), ())
    turning = kvpolicy.load("streaming-llm", budget=30, protect__recent=16).build()
    (answer,) = generate_batch(model, turning, [PromptRow([7] * 45)], Sampling(max_new_tokens=9), ())
    assert len(answer.tokens) == 9
