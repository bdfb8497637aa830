"""With `strict`, a variant that is incomplete, ragged or mixed is refused, not graded."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import pytest

from kvpolicy.study.analysis import compare, refusals, summarise
from kvpolicy.study.records import CellRecord, RunRecord
from kvpolicy.study.report.content import Commands, build
from kvpolicy.study.report.markdown import markdown
from kvpolicy.study.results import Results
from kvpolicy.study.whole import refusal

pytest.importorskip("scipy")

KEYS = tuple(f"{i:040x}" for i in range(6))
CELL = CellRecord("a", "", {}, "m", "d", "", "0", None, keys=KEYS)
RUNS = [
    RunRecord(key, "generate", "m", "d", i // 2, i % 2, "0", None, {"exact": 1.0}, 3, environment=1)
    for i, key in enumerate(KEYS)
]


def test_a_whole_cell_is_graded():
    assert refusal(CELL, RUNS) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda runs: runs[:-2], "it is incomplete: 2 of 6 runs are missing"),
        (lambda runs: [], "it is incomplete: 6 of 6 runs are missing"),
        (lambda runs: [*runs[:-1], replace(runs[-1], error="x")], "it is incomplete: 1 of 6 runs failed"),
        (
            lambda runs: [*runs[:-1], replace(runs[-1], problem=0)],
            "it is ragged: its problems have between 1 and 3 runs each",
        ),
        (
            lambda runs: [*runs[:4], *(replace(run, kind="force", problem=0) for run in runs[4:])],
            "it is ragged: not every problem that was answered was read under teacher forcing too",
        ),
        (
            lambda runs: [*runs[:-1], replace(runs[-1], environment=2)],
            "it is mixed: its runs were made with 2 different sets of versions or kinds of machine",
        ),
    ],
)
def test_what_is_not_whole_is_refused(change, reason):
    assert refusal(CELL, change(list(RUNS))) == reason


def test_a_variant_that_is_not_possible_says_so_itself():
    assert refusal(replace(CELL, error="budget: too small", keys=()), []) is None


def test_a_report_refuses_what_a_study_that_was_stopped_has_left(study, tmp_path):
    path = tmp_path / "r.sqlite"
    made = study.make(strict=True, compare_to="rkv", sampling={"max_new_tokens": 8})
    study.run(made, path)
    with Results(path) as results:
        assert not refusals(summarise(results))
        gone = next(cell for cell in results.cells() if cell.name == "random").keys[0]
    with Results(path, "small") as results:
        results.remove([gone])
    with Results(path) as results:
        rows = summarise(results)
        random = next(row for row in rows if row.cell.name == "random")
        assert (random.metrics, random.values, random.missing) == ({}, {}, 1)
        assert compare(rows, "exact") == []
        sentence = (
            f"random on needle-20 with {random.cell.model} is not graded: it is incomplete: 1 of 4 runs are missing."
        )
        assert refusals(rows) == [sentence]
        text = markdown(build(results, Commands("run", "report")))
        assert "**Not graded**" in text
        assert "it is incomplete: 1 of 4 runs are missing" in text
        assert next(row for row in summarise(results, strict=False) if row.cell.name == "random").metrics


def test_runs_of_other_versions_are_refused(study, tmp_path):
    path = tmp_path / "r.sqlite"
    made = study.make(strict=True, sampling={"max_new_tokens": 8}, samples=2)
    study.run(made, path)
    with Results(path, "small") as results:
        number = results.environment({"python": "0.1"})
        runs = study.plan(made)
        asked = runs.reference_runs()
        from kvpolicy.study.work import Outcome

        results.add(asked[:1], [Outcome(metrics={"exact": 1.0, "tokens": 3.0}, tokens=(1, 2, 3))], number)
    with Results(path) as results:
        (sentence,) = refusals(summarise(results))
    assert sentence.startswith("full on needle-20")
    assert sentence.endswith("it is mixed: its runs were made with 2 different sets of versions or kinds of machine.")
    assert sqlite3.connect(path).execute("select count(distinct environment) from runs").fetchone() == (2,)


def test_a_report_has_the_score_of_each_task(study, tmp_path):
    from kvpolicy.study.report.page import html

    path = tmp_path / "r.sqlite"
    made = study.make(
        datasets=[{"use": "ruler", "tokens": 2000, "tasks": ["niah_single_1", "vt"], "max_new_tokens": 4}],
        conditions={"budget": [0.5], "phase": ["prefill"], "compress": ["context", "prompt"]},
        samples=2,
    )
    study.run(made, path)
    with Results(path) as results:
        rows = summarise(results)
        assert [set(row.by_task("score")) for row in rows] == [{"niah_single_1", "vt"}] * 5
        assert {found.problems for row in rows for found in row.by_task("score").values()} == {1}
        report = build(results, Commands("run", "report"))
    text = markdown(report)
    assert ", by task" in text
    assert "| variant | condition | niah\\_single\\_1 | vt |" in text
    page = html(report)
    assert "by task</summary>" in page
