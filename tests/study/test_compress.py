"""`compress`: a context is compressed before its question is seen, or the whole prompt; or the policy says when."""

from __future__ import annotations

import pytest
import torch

import kvpolicy
from kvpolicy import KVPolicyError, PolicySpec, SpecError
from kvpolicy.cli.study_source import plain
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.study import keys
from kvpolicy.study.decoding import PromptRow, generate_batch
from kvpolicy.study.forcing import ForcedText, force_batch
from kvpolicy.study.records import StudyData
from kvpolicy.study.report.content import Commands, build
from kvpolicy.study.results import Results
from kvpolicy.study.sampling import Sampling
from kvpolicy.study.spec import FIELDS, StudySpec
from kvpolicy.study.work import Outcome
from kvpolicy.testing.tiny import tiny_model
from kvsupport.scripted import scripted_study

MODES = ("prompt", "context")


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3").double()


@pytest.fixture(scope="module")
def rows():
    """Prompts of unequal lengths whose contexts have unequal lengths, too."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((60, 9), (91, 4), (75, 17))
    return [
        PromptRow(torch.randint(7, 256, (a + b,), generator=generator).tolist(), 0, i, a)
        for i, (a, b) in enumerate(sizes)
    ]


def policy_of(name, budget=32, **changes):
    return kvpolicy.load(name, budget, **changes).build()


def by_hand(model, policy, row, mode, tokens):
    """Read, compress once and go on greedily, one token after the other; return tokens and the most that was held."""
    cut = row.context if mode == "context" else len(row.prompt)
    ids = torch.tensor([row.prompt])
    with torch.no_grad(), PolicyCache(policy, model) as cache:
        logits = model(ids[:, :cut], past_key_values=cache).logits[:, -1]
        if cache.engine.rows[0].resident > policy.entries(cut, cut):
            cache.engine._compact([0])
        if cut < ids.shape[1]:
            cache.expect("decode")
            logits = model(ids[:, cut:], past_key_values=cache).logits[:, -1]
        found = [logits.argmax().item()]
        for _ in range(tokens - 1):
            logits = model(torch.tensor([found[-1:]]), past_key_values=cache).logits[:, -1]
            found.append(logits.argmax().item())
        return found, cache.stats().peak_resident


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "policy",
    [
        policy_of("snapkv-prefill", 48),
        policy_of("snapkv-prefill", 0.5),
        policy_of("rkv"),
        policy_of("h2o", 40, protect__recent=8),
        policy_of("adakv-snapkv", 48),
    ],
    ids=lambda policy: f"{policy.name}-{policy.budget.tokens}",
)
def test_a_batch_gives_what_each_row_gives_alone_and_by_hand(model, rows, policy, mode):
    answers = generate_batch(model, policy, rows, Sampling(max_new_tokens=12), (), mode)
    for row, answer in zip(rows, answers, strict=True):
        assert (answer.tokens, answer.usage.peak) == by_hand(model, policy, row, mode, 12)


def test_the_question_is_seen_or_not_and_never_dropped_unless_the_policy_decodes(model, rows):
    row = rows[0]
    plain = generate_batch(model, policy_of("snapkv-prefill", 48), [row], Sampling(max_new_tokens=9), ())[0]
    seen = generate_batch(model, policy_of("snapkv-prefill", 48), [row], Sampling(max_new_tokens=9), (), "prompt")[0]
    unseen = generate_batch(model, policy_of("snapkv-prefill", 48), [row], Sampling(max_new_tokens=9), (), "context")[0]
    assert plain.tokens == seen.tokens  # this policy compresses the prompt by itself
    assert seen.usage.resident == sum(range(49, 57))
    assert unseen.usage.resident == sum(range(48 + 9 + 1, 48 + 9 + 9))  # context at the budget, question and answer
    late = policy_of("rkv", 32, trigger__every=16)
    both = generate_batch(model, late, [row], Sampling(max_new_tokens=40), (), "context")[0]
    assert both.usage.resident / both.usage.steps < 48 + 9  # answer tokens are compacted as the policy says


def test_chunks_bound_what_is_held(model, rows):
    policy = policy_of("snapkv-prefill", 48, prefill_chunk=8)
    together = generate_batch(model, policy, rows, Sampling(max_new_tokens=9), (), "context")
    for row, answer in zip(rows, together, strict=True):
        (alone,) = generate_batch(model, policy, [row], Sampling(max_new_tokens=9), (), "context")
        assert (answer.tokens, answer.usage.peak) == (alone.tokens, alone.usage.peak)
        (first,) = generate_batch(model, policy, [row], Sampling(max_new_tokens=1), (), "context")
        assert first.usage.peak <= max(48 + 8, 48 + len(row.prompt) - row.context)


def test_layers_with_a_window_are_given_rows_alone(rows):
    model = tiny_model("gemma3").double()
    policy = policy_of("snapkv-prefill", 48)
    together = generate_batch(model, policy, rows, Sampling(max_new_tokens=8), (), "context")
    alone = [generate_batch(model, policy, [row], Sampling(max_new_tokens=8), (), "context")[0] for row in rows]
    assert [a.tokens for a in together] == [a.tokens for a in alone]


@pytest.mark.parametrize("mode", MODES)
def test_forcing_compresses_the_same(model, rows, mode):
    policy = policy_of("snapkv-prefill", 48)
    texts = [ForcedText([*row.prompt, *range(20, 30)], len(row.prompt), row.context) for row in rows]
    together = force_batch(model, policy, texts, compress=mode)
    for text, row, found in zip(texts, rows, together, strict=True):
        alone = force_batch(model, policy, [text], compress=mode)[0]
        assert found.kl == pytest.approx(alone.kl, rel=1e-6)
        later = 48 + len(text.tokens) - 1 - (text.prompt if mode == "prompt" else row.context)
        read = len(row.prompt) if mode == "prompt" else row.context
        assert found.usage.peak == alone.usage.peak == max(read, later)
        assert found.kl > 0
    full = force_batch(model, policy_of("full", None), texts, compress=mode)
    assert max(found.kl for found in full) < 1e-9


# -- studies ----------------------------------------------------------------------------------------------------------


def test_a_study_compares_both_and_records_them_apart(study, tmp_path):
    made = study.make(
        axes={"policy": ["snapkv-prefill"]},
        conditions={"budget": [96], "compress": ["context", "prompt"]},
        datasets=[{"use": "needle", "words": 20, "chat": False, "forced": True}],
        samples=2,
        sampling={"max_new_tokens": 8},
        metrics=["exact", "kl", "resident_peak", "bytes_peak"],
    )
    assert [v.condition for v in made.variants()] == ["compress=context", "compress=prompt"]
    assert StudySpec(**made.to_data()) == made
    assert StudySpec.from_yaml(made.to_yaml()) == made
    study.run(made, tmp_path / "r.sqlite")
    with Results(tmp_path / "r.sqlite") as results:
        records = results.records()
        cells = {(cell.name, cell.condition): set(cell.keys) for cell in results.cells()}
    assert {record.error for record in records} == {None}
    context, prompt = (cells["snapkv-prefill", f"compress={mode}"] for mode in MODES[::-1])
    assert len(context) == len(prompt) == 4
    assert not context & prompt
    held = {record.key: record for record in records}
    for key in context:
        assert held[key].document["compress"] == "context"
        assert held[key].metrics["bytes_peak"] > 0
    assert {held[key].document["compress"] for key in prompt} == {"prompt"}
    assert all("compress" not in held[key].document for key in cells["full", ""])
    assert not study.run(made, tmp_path / "r.sqlite").recorded


def test_the_field_says_it_for_all_variants(study):
    made = study.make(compress="context", axes={"policy": ["snapkv-prefill"]}, conditions={"budget": [96]})
    assert [v.compress for v in made.variants()] == ["context"]
    plan = study.plan(made)
    (run,) = {run.compress for runs in plan.asked(plan.cells({}), {})[1:] for run in runs}
    assert run == "context"
    assert {run.compress for run in plan.reference_runs()} == {None}


def test_the_key_holds_the_mode_and_where_the_context_ends(study):
    spec = study.make()
    plan = study.plan(spec)
    problem = plan.problems(plan.models[0], spec.datasets[0])[0][0]
    policy = PolicySpec(policy="p", budget=8, trigger={"every": 4}, importance="recency", mixer="importance_only")
    documents = [keys.common(plan.models[0], problem, None, policy, "d", "c", mode) for mode in (None, *MODES)]
    assert len({keys.key_of(document) for document in documents}) == 3
    assert set(documents[2]) - set(documents[0]) == {"compress", "context"}
    assert set(documents[2]) <= set(keys.WORDS)
    assert problem.prompt.startswith(f"{problem.context}\n\nWhat is the secret number of")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compress": "question"}, "compress: should be 'prompt' or 'context'"),
        (
            {"conditions": {"budget": [64], "compress": ["all"]}},
            "conditions.compress.0: should be one of prompt, context, got 'all'",
        ),
        (
            {"compress": "context", "conditions": {"budget": [64], "compress": ["prompt"]}},
            "compress: is among the axes or conditions too; write it once.",
        ),
    ],
)
def test_wrong_modes_are_one_sentence(study, fields, message):
    with pytest.raises(SpecError, match=message.replace(".", r"\.")):
        study.make(**fields)


def test_a_dataset_without_a_context_is_refused_before_anything_runs(study, folder):
    for dataset in (
        {"use": "jsonl", "path": str(folder / "sums.jsonl"), "question": "problem"},
        {"use": "text", "path": str(folder / "cat.txt"), "tokens": 64},
    ):
        spec = study.make(compress="context", datasets=[dataset])
        with pytest.raises(KVPolicyError, match="has no context apart from its questions"):
            study.plan(spec)
        study.plan(study.make(compress="prompt", datasets=[dataset]))


def test_a_policy_that_pins_the_prompt_fails_by_that_cause(study, tmp_path):
    spec = study.make(
        compress="context", axes={"policy": ["recent-pinned"]}, conditions={"budget": [400]}, samples=1,
        sampling={"max_new_tokens": 4},
    )  # fmt: skip
    study.run(spec, tmp_path / "r.sqlite")
    with Results(tmp_path / "r.sqlite") as results:
        errors = {record.error for record in results.records() if record.error}
    (error,) = errors
    assert error.startswith("policy 'recent-pinned' pins the prompt, which the context would be")


def test_the_report_says_what_a_study_compresses(study, tmp_path):
    """So does what is read back of a results file, which is compared with the study's file."""
    spec = study.make(compress="prompt", axes={"policy": ["snapkv-prefill"]}, conditions={"budget": [96]}, samples=1)
    scripted_study(spec, tmp_path / "r.sqlite", lambda task, item: Outcome(None, {"exact": 1.0, "tokens": 5.0}, "x"))
    with Results(tmp_path / "r.sqlite") as results:
        assert results.study() == plain(spec)
        made = build(results, Commands("run", "report")).settings
    assert made.facts["compress"] == "prompt"
    assert "compress: prompt" in made.study


def test_every_field_of_a_study_is_read_back():
    assert set(StudyData.__annotations__) == set(FIELDS)
