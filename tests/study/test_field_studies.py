"""The studies that the field shares: what they compare, their size without a network, and what options replace."""

from __future__ import annotations

import json
import re

import pytest

from kvpolicy.cli import main
from kvpolicy.study import executors
from kvpolicy.study.spec import find_study

pytest.importorskip("scipy")

REASONING = {
    "reasoning-4x": (1024, 2048, 4096),
    "reasoning-8x": (512, 1024, 2048),
    "reasoning-16x": (256, 512, 1024),
}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(executors, "Processes", lambda workers: executors.Inline())

    def call(*arguments):
        code = main(["study", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize(("name", "budgets"), REASONING.items())
def test_every_policy_of_a_reasoning_study_has_the_same_protection(name, budgets):
    study = find_study(name)
    variants = study.variants()
    assert {"random-pinned", "recent-pinned"} <= {variant.name for variant in variants}
    assert study.compare_to == "random-pinned"
    assert study.strict
    for variant in variants:
        protect = variant.policy.to_data()["protect"]
        assert (protect["prompt"], protect["sinks"], protect["recent"]) == ({}, {"count": 4}, {"count": 8}), (
            variant.name
        )
        assert variant.policy.to_data()["trigger"]["interval"] == 128
        assert variant.policy.phase == "decode"
    math, gpqa, aime = budgets
    cells = {source.label: (source.budget, source.rollouts, source.size) for source in study.datasets}
    assert cells == {
        "math-500": (math, 2, 500),
        "gpqa-diamond": (gpqa, 4, 198),
        "aime-2025": (aime, 16, 30),
        "aime-2026": (aime, 16, 30),
        "hmmt-2025": (aime, 16, 60),
    }
    sampling = study.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.6, 0.95, 32768)
    quick = study.quickened()
    assert quick.models == ("reasoner",)
    assert len(quick.variants()) == len(variants)


def test_ruler_is_compressed_at_the_prompt_to_four_budgets():
    study = find_study("ruler-4k")
    budgets = {json.dumps(variant.policy.to_data()["budget"]) for variant in study.variants()}
    assert budgets == {json.dumps({"fraction": share}) for share in (0.75, 0.5, 0.25, 0.125)}
    assert {variant.policy.phase for variant in study.variants()} == {"prefill"}
    assert {variant.compress for variant in study.variants()} == {"context", "prompt"}
    assert sum(len(source.chosen) for source in study.datasets) == 13
    assert study.strict


@pytest.mark.parametrize("name", [*REASONING, "ruler-4k"])
def test_their_size_is_counted_without_a_network(run, name):
    code, out, err = run("plan", name)
    assert code == 0
    study = find_study(name)
    runs = 0
    for source in study.datasets:
        (line,) = re.findall(rf"^ *{source.label} .*$", out, flags=re.MULTILINE)
        problems = min(source.samples or study.samples, source.size or 10**6)
        answers = source.rollouts if study.sampling.temperature else 1
        expected = len(study.models) * problems * answers * (len(study.variants()) + 1)
        assert line.split()[1] == f"{problems:,}"
        assert line.split()[-1] == f"{expected:,}"
        runs += expected
    assert f"{len(study.variants())} variants and the full cache, {runs:,} runs of at most" in out
    assert study.models[0] in err
    counted, missing, instead = err.splitlines()
    assert counted.endswith("No time is estimated, because something that the study names is not on this machine.")
    assert missing.startswith("Not here: models: ")
    assert instead == "To plan or run it with what is here, name that with `--model`, `--dataset` and `--data`."


def test_a_local_copy_and_another_model_take_their_place(run, tmp_path, model_folder):
    rows = [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(6)]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--model", model_folder, "--dataset", "math-500", "--data", "math-500=math.jsonl", "--samples", 2)
    options = (*options, "--seeds", 2, "--max-new-tokens", 12)
    code, out, _ = run("plan", "reasoning-4x", *options, "--no-probe")
    assert code == 0
    assert "10 variants and the full cache, 44 runs; about 528 tokens" in out
    code, out, err = run("run", "reasoning-4x", *options)
    assert code == 0, err
    assert "math-500 · " in out
    assert "not graded" not in out
    assert len(re.findall(r"^ *\S+ +4 +0\.0 ", out, flags=re.MULTILINE)) == 11
    code, out, _ = run("report", "reasoning-4x.sqlite")
    assert code == 0
    assert "math-500" in (tmp_path / "reasoning-4x.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dataset", "mth"), "--dataset: the study has no dataset 'mth'."),
        (("--data", "aime=x"), "--data: the study has no dataset 'aime'."),
        (("--data", "aime-2025"), "--data: 'aime-2025' names no file; write aime-2025=PATH."),
        (("--quick", "--data", "prompt-recall-short=x"), "--data: prompt-recall-short is read from no file;"),
        (("--model", "reasoner", "--model", "reasoner"), "models.1: 'reasoner' is there twice; remove one."),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(run, options, message):
    code, _, err = run("plan", "reasoning-4x", *options)
    assert code == 1
    assert message in " ".join(err.split())


def test_a_budget_is_said_once(tmp_path):
    from kvpolicy import SpecError
    from kvpolicy.study.spec import StudySpec

    fields = {"study": "x", "base": "rkv", "models": ["reasoner"]}
    needle = {"use": "needle", "budget": 64}
    with pytest.raises(SpecError, match=r"datasets.0.budget: is said in `conditions` too; write one of the two"):
        StudySpec(**fields, datasets=[needle], conditions={"budget": [64]})
    made = StudySpec(**fields, datasets=[needle], axes={"mixer.weight": [0.1, 0.3]})
    assert made.datasets[0].budget == 64


def test_rollouts_and_the_budget_of_a_data_set(study):
    made = study.make(
        datasets=[
            {"use": "needle", "words": 20, "chat": False, "budget": 70, "rollouts": 3},
            {"use": "needle", "name": "other", "words": 20, "chat": False, "budget": 90, "max_new_tokens": 7},
        ],
        conditions={"trigger.interval": [16]},
        sampling={"max_new_tokens": 40, "temperature": 0.5},
    )
    plan = study.plan(made)
    cells = plan.cells(plan.traces({}))
    assert [cell.policy.to_data()["budget"] for cell in cells if cell.variant.name == "rkv"] == [
        {"tokens": 70},
        {"tokens": 90},
    ]
    runs = plan.asked(cells, {})
    assert sorted({run.seed for run in runs[1]}) == [0, 1, 2]
    assert {run.sampling.max_new_tokens for run in runs[-1]} == {7}
    assert {run.sampling.temperature for run in runs[-1]} == {0.5}
