"""`kvpolicy study budget` on results files that a script has written."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from kvpolicy.cli import main
from kvpolicy.study.asked import Asked
from kvpolicy.study.report.content import Commands
from kvpolicy.study.results import Results
from kvpolicy.study.spec import StudySpec
from kvpolicy.study.work import Outcome
from kvsupport.scripted import scripted_study

pytest.importorskip("scipy")

NEEDLE = {"use": "needle", "words": 20, "chat": False}
LOST = {  # problems that are wrong, of those that the full cache has right
    ("rkv", 128): (), ("rkv", 96): (5,), ("rkv", 64): range(0, 260, 4), ("rkv", 48): (),
    ("snapkv", 128): range(0, 260, 40), ("snapkv", 96): range(0, 260, 3), ("snapkv", 64): (), ("snapkv", 48): (),
}  # fmt: skip


def spec(**fields):
    data = {
        "study": "small",
        "models": ["nowhere"],
        "datasets": [NEEDLE],
        "axes": {"policy": ["rkv", "snapkv"]},
        "conditions": {"budget": [64, 128, 48, 96]},
        "samples": 260,
        "metrics": ["exact", "tokens"],
    }
    return StudySpec(**{**data, **fields})


def script(task, item):
    key = task.policy["policy"], task.policy["budget"].get("tokens")
    return Outcome(None, {"exact": float(item.problem.index not in LOST.get(key, ())), "tokens": 9.0}, "", (1, 2), 9)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that records a study and asks for its budgets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*options, study=None, says=script, change=None, name="small.sqlite"):
        path = tmp_path / "small.sqlite"
        if not path.exists():
            scripted_study(study or spec(), path, says)
        if change is not None:
            with Results(path, "small") as results:
                change(results)
        code = main(["study", "budget", name, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_smallest_budget_of_each_policy_is_named(run):
    code, out, _ = run()
    assert code == 0
    assert "needle-20 · nowhere, rkv: 96 is the smallest budget that loses less than 2 points." in out
    assert len(re.findall(r" (yes|not shown|not tried) *$", out, flags=re.MULTILINE)) == 8
    assert re.search(r"needle-20 +rkv +128 +260 +0\.0 +1\.3 +0\.007 +yes", out)
    assert re.search(r"^ +64 +25\.0 .* not shown *$", out, flags=re.MULTILINE)
    assert re.search(r"^ +48 +0\.0 .* not tried *$", out, flags=re.MULTILINE), "a smaller one after one that failed"
    assert "snapkv: no budget of the study is shown to lose less than 2 points" in out
    assert (
        re.search(r"if others go like these, about [\d,]+ problems would show it of 128", out) is None
    )  # 2.0 are lost
    assert "Each of them holds with a confidence of 95 %" in out


def test_a_looser_bound_and_answers_that_hold_together(run):
    _, out, _ = run("--loss", "0.08")
    assert "snapkv: 128 is the smallest budget that loses less than 8 points" in out
    assert run("--confidence", "0.99")[0] == 0
    code, _, err = run("--confidence", "0.99", "--together")
    assert code == 1
    assert err.startswith(
        "error: budget: 260 problems are too few to show a loss below 2 points with a confidence of 99.5 %"
    )
    _, out, _ = run("--loss", "0.08", "--together")
    assert "All of them hold together with a confidence of 95 %" in out


def test_with_too_few_problems_it_refuses_and_says_how_many_are_needed(run):
    code, out, err = run(study=spec(samples=40))
    assert (code, out) == (1, "")
    assert err == (
        "error: budget: 40 problems are too few to show a loss below 2 points with a confidence of 95 %, even if "
        "nothing is lost; at least 163 are needed: raise `samples` or add seeds.\n"
    )


def test_with_enough_problems_but_some_lost_it_says_how_many_would_do(run):
    code, out, _ = run("--loss", "0.03", "--metric", "exact", study=spec(axes={"policy": ["snapkv"]}))
    assert code == 1
    found = re.search(r"about ([\d,]+) problems would show it of 128", out)
    assert 1_000 <= int(found[1].replace(",", "")) <= 100_000


def test_all_datasets_together_have_an_answer_of_their_own(run):
    def says(task, item):
        if item.problem.dataset == "other" and task.policy["budget"].get("tokens") == 96:
            return Outcome(None, {"exact": float(item.problem.index % 2), "tokens": 9.0}, "", (1, 2), 9)
        return script(task, item)

    study = spec(datasets=[NEEDLE, {**NEEDLE, "name": "other"}], axes={"policy": ["rkv"]})
    _, out, _ = run(study=study, says=says)
    assert "needle-20 · nowhere, rkv: 96 is" in out
    assert "other · nowhere, rkv: 128 is" in out
    assert "all datasets · nowhere, rkv: 128 is" in out


def test_failures_count_as_lost_and_missing_runs_are_refused(run):
    def says(task, item):
        if task.policy["policy"] == "rkv" and item.problem.index < 10:
            return Outcome(error="out of memory.")
        return script(task, item)

    _, out, _ = run(study=spec(axes={"policy": ["rkv"]}), says=says)
    assert re.search(r"rkv +128 +260 +3\.8 ", out)

    def forget(results):
        results.remove({results.records()[0].key})

    code, _, err = run(change=forget)
    assert (code, err) == (1, "error: budget: 1 of the 1,300 runs that the study asks for are missing; run it first.\n")


def test_a_budget_at_which_every_run_failed_loses_everything(run):
    def says(task, item):
        if task.policy["budget"].get("tokens") == 128:
            return Outcome(error="out of memory.")
        return script(task, item)

    code, out, _ = run(study=spec(axes={"policy": ["rkv"]}), says=says)
    assert code == 1
    assert re.search(r"rkv +128 +260 +100\.0 +100\.0 .* not shown *$", out, flags=re.MULTILINE)


def test_problems_of_tasks_that_are_graded_otherwise_are_left_out(run):
    def says(task, item):
        found = script(task, item)
        if item.problem.index % 2:
            return found
        return replace(found, metrics={"score": 0.25, "tokens": 9.0})

    _, out, _ = run("--metric", "exact", "--loss", "0.1", study=spec(axes={"policy": ["rkv"]}), says=says)
    assert re.search(r"rkv +128 +130 +0\.0 ", out)


def test_a_published_file_gives_the_same_answer(run, tmp_path):
    from kvpolicy.study.report.publishing import publish

    pytest.importorskip("matplotlib")
    _, out, _ = run()
    with Results(tmp_path / "small.sqlite") as results:
        publish(results, Asked.last(results), Commands("a", "b"), tmp_path / "docs")
    assert run(name="docs/small.json.gz") == (0, out, "")


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        (("--loss", "2"), {}, "--loss: should be a number between 0 and 1, such as 0.02 or 0.95, got 2."),
        (("--confidence", "95"), {}, "--confidence: should be a number between 0 and 1"),
        (
            ("--metric", "kl"),
            {},
            "--metric: 'kl' has no bounds, or the full cache does not have it. Write one of exact, score,",
        ),
        (("--metric", "exat"), {}, "--metric: 'exat' is not known. Did you mean 'exact'?"),
        (("--metric", "progress"), {}, "budget: no dataset of the study gives progress, so there is no loss of it."),
        ((), {"conditions": {"budget": [64]}}, "budget: the study compares fewer than two budgets; give it several"),
        (
            (),
            {"conditions": {"budget": [64, 0.5]}},
            "budget: the study's budgets are of several kinds (64, 0.5), so that",
        ),
        (
            (),
            {"metrics": ["tokens"]},
            "budget: the study measures none of exact, score, progress; add one to `metrics`.",
        ),
    ],
)
def test_what_has_no_answer_is_said_in_one_sentence(run, options, fields, message):
    code, out, err = run(*options, study=spec(samples=2, **fields))
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
