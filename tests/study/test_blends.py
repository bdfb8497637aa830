"""A study that is changed and run again into the same file: every number is of the settings as they are now."""

from __future__ import annotations

import json
import shutil

import pytest

from kvpolicy.cli import main
from kvpolicy.study import keys
from kvpolicy.study.analysis import summarise
from kvpolicy.study.asked import Asked
from kvpolicy.study.report.content import Commands, build
from kvpolicy.study.results import Results

pytest.importorskip("scipy")


def numbers(path):
    """What the tables say, but times; and how many runs of other settings the file holds."""
    with Results(path) as results:
        rows = summarise(results)
        older = Asked.last(results).older(results)
    names = [name for name in rows[0].metrics if name != "seconds"]
    return [(r.cell.name, r.runs, r.failed, {n: r.values.get(n) for n in names}) for r in rows], older


@pytest.fixture
def again(study, tmp_path):
    """Run one study and then another into the same file; return its numbers, those of a fresh file, and the rest."""

    def run(first, second):
        study.run(first, tmp_path / "both.sqlite")
        study.run(second, tmp_path / "both.sqlite")
        study.run(second, tmp_path / "fresh.sqlite")
        both, older = numbers(tmp_path / "both.sqlite")
        fresh, none = numbers(tmp_path / "fresh.sqlite")
        assert not none.keys
        return both, fresh, older

    return run


@pytest.mark.parametrize(
    ("changed", "reason", "count"),
    [
        ({"sampling": {"max_new_tokens": 20}}, "other max_new_tokens", 8),
        ({"sampling": {"max_new_tokens": 40, "temperature": 0.7}}, "other temperature", 8),
        ({"samples": 1}, "other problems", 6),
        ({"dtype": "float32"}, "other dtype", 8),
        ({"axes": {"policy": ["random"]}}, "other policies", 4),
        ({"seeds": [3], "datasets": [{"use": "needle", "words": 20, "chat": False}]}, "other problems", 8),
    ],
    ids=["length", "temperature", "samples", "dtype", "policy", "seed"],
)
def test_runs_of_other_settings_count_in_no_number(study, again, changed, reason, count):
    first = study.make(axes={"policy": ["rkv"]})
    second = study.make(**{"axes": {"policy": ["rkv"]}, **changed})
    both, fresh, older = again(first, second)
    assert both == fresh
    assert older.reasons == {reason: count}
    assert str(older) == (f"{count} older runs of other settings are in the file and not counted ({count} of {reason})")


def sums(folder, answers):
    rows = [{"question": f"What is {i} plus {i}?", "answer": answer} for i, answer in enumerate(answers)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"use": "jsonl", "path": str(folder / "sums.jsonl"), "grade": "text", "chat": False}


@pytest.mark.parametrize("what", ["answers", "questions", "template"])
def test_changed_problems_are_other_problems(study, again, tmp_path, what):
    pytest.importorskip("datasets")
    made = study.make(axes={"policy": ["rkv"]}, datasets=[sums(tmp_path, ["a", "b", "c", "d"])])
    study.run(made, tmp_path / "both.sqlite")
    if what == "answers":
        sums(tmp_path, ["e", "f", "g", "h"])
    elif what == "questions":
        text = (tmp_path / "sums.jsonl").read_text()
        (tmp_path / "sums.jsonl").write_text(text.replace("plus", "times"))
    else:
        made = study.make(
            axes={"policy": ["rkv"]}, datasets=[{**made.to_data()["datasets"][0], "template": "{question}"}]
        )
    both, fresh, older = again(made, made)
    assert both == fresh
    assert [row[1] for row in both] == [4, 4]
    assert older.reasons == {"other content of a problem": 8}
    with Results(tmp_path / "both.sqlite") as results:
        report = build(results, Commands("", ""))
    (problems,) = report.settings.problems.values()
    assert len(problems) == 4
    for problem in problems:
        assert ("times" in problem.prompt) == (what == "questions")
        assert (problem.answer in "efgh") == (what == "answers")
        assert ("boxed" in problem.prompt) == (what != "template")
    assert report.older.startswith("8 older runs of other settings are in the file and not counted")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "generation_config.json"])
def test_another_model_in_the_same_folder_is_another_model(study, again, tmp_path, model_folder, file):
    """The middle of the weights too: a fingerprint of the first and last bytes would miss it."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    made = study.make(axes={"policy": ["rkv"]}, models=[str(folder)], sampling={"max_new_tokens": 12})
    study.run(made, tmp_path / "both.sqlite")
    path = folder / file
    raw = bytearray(path.read_bytes()) if path.exists() else bytearray(b"{}")
    if file == "model.safetensors":
        raw[len(raw) // 2] ^= 1
    else:
        raw += b"\n"
    path.write_bytes(raw)
    both, fresh, older = again(made, made)
    assert both == fresh
    assert older.reasons == {"other weights, configuration or tokenizer": 8}


def test_other_code_of_a_component_is_another_policy(study, tmp_path, monkeypatch):
    made = study.make(axes={"policy": ["rkv"]})
    study.run(made, tmp_path / "r.sqlite")
    changed = tmp_path / "changed.py"
    monkeypatch.setattr(keys, "_file_of", lambda component: changed)
    changed.write_text("# other code\n")
    assert len(study.run(made, tmp_path / "r.sqlite").recorded) == 8
    assert numbers(tmp_path / "r.sqlite")[1].reasons == {"other code or tables of components": 8}


STUDY = """\
schema_version: 1
kind: study
study: small
axes: {{policy: [rkv]}}
conditions: {{budget: [64], trigger.interval: [16]}}
models: [{model}]
datasets: [{{use: needle, words: 20, chat: false}}]
samples: 4
sampling: {{max_new_tokens: {length}}}
"""


@pytest.fixture
def command(capsys, monkeypatch, tmp_path, model_folder):
    """Return functions that write `small.yaml` and run a command of `kvpolicy study` beside it."""
    from kvpolicy.study import executors

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(executors, "Processes", lambda workers: executors.Inline())

    def call(*arguments, length=20):
        (tmp_path / "small.yaml").write_text(STUDY.format(model=model_folder, length=length))
        code = main(["study", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


OLDER = "8 older runs of other settings are in the file and not counted (8 of other max_new_tokens)"


def test_tables_status_plan_and_report_are_of_the_study_as_it_is_now(command, tmp_path):
    pytest.importorskip("jinja2")
    assert command("run", "small.yaml", length=10)[0] == 0
    # It has been changed, but not run again: nothing of it is there.
    assert command("status", "small.yaml")[1].startswith("small.sqlite: 0 of 8 runs are recorded, 0 of them failed")
    assert OLDER in command("status", "small.yaml")[1]
    assert OLDER in command("plan", "small.yaml", "--no-probe")[1]
    code, out, _ = command("report", "small.yaml")
    assert (code, OLDER in out) == (0, True)
    page = (tmp_path / "small.md").read_text()
    assert "0 runs of the 8 that the study asks for" in page
    assert "Not run yet" in (tmp_path / "small.html").read_text()
    # The results file alone is the study as it ran last.
    assert command("report", "small.sqlite")[1] == "Written: small.html and small.md.\n"
    assert "8 runs; differences are to" in (tmp_path / "small.md").read_text()
    out = command("run", "small.yaml")[1]
    assert OLDER in out
    assert "12 runs" not in out
    assert OLDER in command("report", "small.sqlite")[1]


def test_prune_removes_what_does_not_count_and_nothing_else(command, tmp_path):
    command("run", "small.yaml", length=10)
    table = command("run", "small.yaml")[1].replace(f"{OLDER}; `kvpolicy study prune small.sqlite` removes them.\n", "")
    size = (tmp_path / "small.sqlite").stat().st_size
    code, out, err = command("prune", "small.sqlite")
    assert (code, out, err) == (
        1,
        f"{OLDER}.\n",
        "error: prune: nobody can be asked here; write --yes to remove them.\n",
    )
    assert command("prune", "small.sqlite", "--yes")[1] == f"{OLDER}.\nsmall.sqlite: 8 runs removed.\n"
    assert (tmp_path / "small.sqlite").stat().st_size <= size
    assert command("prune", "small.sqlite")[1] == "small.sqlite: every run in it counts; there is nothing to remove.\n"
    code, out, err = command("run", "small.yaml")
    assert (code, out, err) == (0, table, ""), "nothing that counts has gone"
