"""What is published of a study: its report is made again from it."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import pytest

from kvpolicy.cli import main
from kvpolicy.study.analysis import summarise
from kvpolicy.study.asked import Asked
from kvpolicy.study.published import Published, published
from kvpolicy.study.report.content import Commands, build
from kvpolicy.study.report.markdown import markdown
from kvpolicy.study.report.page import html
from kvpolicy.study.report.publishing import publish
from kvpolicy.study.results import Results, ResultsError
from kvpolicy.study.spec import StudySpec
from kvpolicy.study.work import Outcome
from kvsupport.scripted import scripted_study

pytest.importorskip("scipy")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

COMMANDS = Commands("kvpolicy study run small", "kvpolicy study report small --publish docs")
SPEC = StudySpec(
    study="small",
    models=["nowhere"],
    datasets=[{"use": "needle", "words": 20, "chat": False, "forced": True}],
    axes={"policy": ["rkv", "random"]},
    conditions={"budget": [64, {"trace": 0.9}], "trigger.interval": [16]},
    samples=5,
    metrics=["exact", "kl", "tokens", "bytes_peak", "seconds"],
)


def script(task, item):
    """One run fails; the divergence has more digits than are published."""
    policy, number = task.policy["policy"], item.problem.index
    if policy == "random" and number == 3 and task.kind == "generate":
        return Outcome(error="the disk is full.")
    metrics = {"bytes_peak": 640.0, "seconds": 1.25}
    if task.kind == "generate":
        metrics |= {"exact": float((number + len(policy)) % 2), "tokens": 100.0}
    else:
        metrics["kl"] = (1 + number) / 7 + len(policy) / 1e3
    return Outcome(None, metrics, "some text", (1, 2, 3), 28)


@pytest.fixture
def recorded(tmp_path):
    path = tmp_path / "small.sqlite"
    scripted_study(SPEC, path, script)
    return path


def written(recorded, folder):
    with Results(recorded) as results:
        return publish(results, Asked.last(results), COMMANDS, folder)


def test_the_report_of_what_is_published_says_the_same(recorded, tmp_path):
    files = written(recorded, tmp_path / "docs")
    with Results(recorded) as results:
        first = build(results, COMMANDS)
    second = build(Published(files.data), COMMANDS)
    assert markdown(second) == markdown(first)
    pages = [html(each) for each in (first, second)]
    tables = [re.sub(r"<figure.*?</figure>", "", text, flags=re.DOTALL) for text in pages]  # they differ by 0.01 px
    assert tables[0] == tables[1]
    points = [re.findall(r"<title[^>]*>(.*?)</title>", text) for text in pages]
    assert points[0] == points[1]
    assert len(points[0]) > 10
    assert (second.runs, second.failed, second.asked) == (first.runs, first.failed, first.asked)
    assert second.settings.measured == first.settings.measured
    assert files.data.stat().st_size < 8_000
    assert b"some text" not in gzip.decompress(files.data.read_bytes())


def test_the_same_runs_give_the_same_bytes_and_old_pictures_go(recorded, tmp_path):
    once = written(recorded, tmp_path / "docs")
    (tmp_path / "docs" / "small" / "of-another-time.svg").write_text("<svg/>")
    (tmp_path / "docs" / "small" / "note.txt").write_text("mine")
    before = {path: path.read_bytes() for path in (once.data, once.markdown, *once.pictures)}
    again = written(recorded, tmp_path / "docs")
    assert {path: path.read_bytes() for path in (again.data, again.markdown, *again.pictures)} == before
    assert {path.name for path in (tmp_path / "docs" / "small").iterdir()} == {
        "note.txt",
        *(path.name for path in again.pictures),
    }


def test_where_a_machine_keeps_its_files_is_not_published(recorded, tmp_path):
    """Not of texts, corpora, models, policies and tables, nor of commands; two files of one name stay apart."""
    with Results(recorded) as results:
        last = Asked.last(results)
        study = {
            **last.study,
            "models": ["/home/me/models/tiny", "smollm2"],
            "axes": {"policy": ["/home/me/policies/mine.yaml", "rkv"]},
            "datasets": [
                {"use": "text", "path": ["/home/me/one/texts/a.jsonl", "/home/me/two/texts/a.jsonl"]},
                {"use": "ruler", "text": "C:\\Users\\me\\words.txt"},
                {"use": "jsonl", "path": "/home/me/sums.jsonl", "template": "/no_think {question}"},
            ],
        }
        policy = "importance: {use: trigonometric, table: /home/me/my tables/t.safetensors}\n"
        cells = [replace(cell, model="/home/me/models/tiny", policy=policy) for cell in last.cells]
        command = "kvpolicy study run /home/me/small.yaml --out '/home/me/my runs.sqlite'"
        runs = [
            replace(run, error=run.error and f"models: /home/me/models/tiny: {run.error}") for run in results.records()
        ]
        told = SimpleNamespace(
            records=lambda keys, outputs: runs, problems=results.problems, meta=results.meta,
            environments=results.environments,
        )  # fmt: skip
        text = gzip.decompress(published(told, replace(last, study=study, cells=cells), command)).decode()
    document = json.loads(text)
    assert "/home/me" not in text
    assert "Users" not in text
    assert document["command"] == "kvpolicy study run small.yaml --out 'my runs.sqlite'"
    assert document["spec"]["models"] == ["models/tiny", "smollm2"]
    assert document["spec"]["datasets"][0]["path"] == ["one/texts/a.jsonl", "two/texts/a.jsonl"]
    assert document["spec"]["datasets"][2] == {**study["datasets"][2], "path": "me/sums.jsonl"}
    assert {cell["model"] for cell in document["cells"]} == {"models/tiny"}
    assert {cell["policy"] for cell in document["cells"]} == {policy.replace("/home/me/", "")}
    assert {error for group in document["runs"] for error in group["errors"].values()} == {
        "models: models/tiny: the disk is full."
    }


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("kvpolicy study report small --publish /home/me/docs", "kvpolicy study report small --publish docs"),
        ("kvpolicy study report 'small", "kvpolicy study report 'small"),  # of a file that somebody wrote
    ],
)
def test_nor_where_it_was_published(recorded, tmp_path, command, shown):
    with Results(recorded) as results:
        asked = Asked.last(results)
        files = publish(results, asked, Commands("kvpolicy study run '", command), tmp_path / "docs")
    assert shown in files.markdown.read_text().splitlines()


def test_the_markdown_shows_pictures_that_stand_alone(recorded, tmp_path):
    files = written(recorded, tmp_path / "docs")
    text = files.markdown.read_text()
    shown = re.findall(r"^!\[.+\]\((small/[a-z0-9.-]+\.svg)\)$", text, flags=re.MULTILINE)
    assert {tmp_path / "docs" / each for each in shown} == set(files.pictures)
    assert "(small.json.gz)" in text
    for path in files.pictures:
        picture = path.read_text()
        root = ET.fromstring(picture)
        assert root.attrib["width"].endswith("pt")
        assert "var(" not in picture
        assert "<ns0" not in picture
        assert not [each for each in root.iter() if each.tag.endswith("}a")], "links lead nowhere outside of the page"
        assert not re.search(r"#0[1-6]0[1-6]0[1-9a]", picture)


def test_variants_that_differ_in_what_is_compressed_keep_their_own_runs(tmp_path):
    """The policy is the same; only the key of a run says what was compressed."""
    spec = StudySpec(
        study="small",
        models=["nowhere"],
        datasets=[{"use": "needle", "words": 20, "chat": False}],
        axes={"policy": ["snapkv-prefill"]},
        conditions={"budget": [64], "compress": ["context", "prompt"], "phase": ["prefill"]},
        samples=5,
        metrics=["exact", "tokens"],
    )
    path, data = tmp_path / "small.sqlite", tmp_path / "small.json.gz"

    def right(task, item):
        return Outcome(None, {"exact": float(task.compress != "context"), "tokens": 9.0}, "", (1, 2), 28)

    scripted_study(spec, path, right)
    with Results(path) as results:
        data.write_bytes(published(results, Asked.last(results), "kvpolicy study run small"))
        rows = summarise(results, ["exact"])
    for found in (rows, summarise(Published(data), ["exact"])):
        assert [(row.cell.condition, row.runs, row.metrics["exact"].value) for row in found] == [
            ("", 5, 1.0),
            ("compress=context", 5, 0.0),
            ("compress=prompt", 5, 1.0),
        ]
    for file in (Results(path), Published(data)):
        assert build(file, COMMANDS).runs == 15


def test_runs_that_are_missing_are_missing_there_too(recorded, tmp_path):
    with Results(recorded, "small") as results:
        gone = [record.key for record in results.records() if record.problem == 4 and record.kind == "generate"]
        results.remove(gone)
        asked = Asked.last(results)
        files = publish(results, asked, COMMANDS, tmp_path / "docs")
    report = build(Published(files.data), COMMANDS)
    assert (report.asked, report.asked - report.runs) == (len(asked.keys), len(gone))


def spoilt(files, change):
    document = json.loads(gzip.decompress(files.data.read_bytes()))
    change(document)
    files.data.write_bytes(gzip.compress(json.dumps(document).encode()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(kvpolicy_results=1), "is of version 1, and this kvpolicy reads version 2"),
        (lambda d: d.pop("cells"), r"not a published file of a study \(cells: Field required\)"),
        (lambda d: d["runs"][0]["seed"].pop(), "the columns of its runs are not of one length"),
        (lambda d: d["runs"][0]["content"].__setitem__(0, 99), "a run in it is of a problem that is not there"),
        (lambda d: d["runs"][0]["metrics"].update(exact=[2, 0, 0, 0, 0]), "numbers that cannot be: exact is 2"),
        (lambda d: d["cells"][0].update(name="a\x1b[2Jb"), "a name in it has characters that names cannot have"),
        (
            lambda d: d["runs"][0]["finished"].__setitem__(0, 10**12),
            "finished.0: Input should be less than or equal to",
        ),
        (lambda d: d.update(study="../elsewhere"), r"\(study: String should match pattern"),
        (lambda d: d["cells"][1].update(runs=[[0, 5]]), "is of runs that are not there, or not its own"),
        (lambda d: d["cells"][0].update(runs=[[4, 10**5]]), "is of runs that are not there, or not its own"),
        (lambda d: d["cells"][0].update(runs=[[-1, 10**12]]), "its variants have more than 1,000,000 runs"),
        (
            lambda d: [cell.update(runs=[[-1, 400_000]]) for cell in d["cells"]],
            "its variants have more than 1,000,000 runs",
        ),
        (
            lambda d: d["cells"][0].update(runs=[[-1, -5]]),
            "cells.0.runs.0.1: Input should be greater than or equal to 1",
        ),
        (lambda d: d["runs"][0].update(environment=["x"] * 5), "environment.0: Input should be a valid integer"),
    ],
)
def test_a_file_that_was_changed_is_refused(recorded, tmp_path, change, message):
    files = written(recorded, tmp_path / "docs")
    spoilt(files, change)
    with pytest.raises(ResultsError, match=message):
        Published(files.data)


def test_a_file_that_is_cut_off_or_another_one_is_refused(recorded, tmp_path):
    files = written(recorded, tmp_path / "docs")
    whole = files.data.read_bytes()
    for data, message in ((whole[:-40], "cut off"), (b"PK nothing", "not compressed by gzip"), (b"", "cut off")):
        files.data.write_bytes(data)
        with pytest.raises(ResultsError, match=message):
            Published(files.data)
    with pytest.raises(ResultsError, match="there is no such file"):
        Published(tmp_path / "none.json.gz")


def test_the_command_publishes_and_makes_the_page_again(recorded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["study", "report", "small.sqlite", "--publish", "docs"]) == 0
    out = capsys.readouterr().out
    assert out == "Written: docs/small.md, docs/small.json.gz and 3 pictures beside them.\n"
    assert "kvpolicy study report small.sqlite --publish docs" in (tmp_path / "docs/small.md").read_text()
    assert not (tmp_path / "small.html").exists()
    text = (tmp_path / "docs/small.md").read_text()
    assert main(["study", "report", "docs/small.json.gz"]) == 0
    assert capsys.readouterr().out == "Written: docs/small.html.\n"
    page = (tmp_path / "docs/small.html").read_text()
    assert "kvpolicy study run small.yaml --out small.sqlite\nkvpolicy study report docs/small.json.gz" in page
    assert (tmp_path / "docs/small.md").read_text() == text, "the Markdown with its pictures stays"
    assert main(["study", "status", "docs/small.json.gz"]) == 1
    assert "is a published file, which only `report` and `budget` read" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["study", "report", "small.sqlite", "--publish", "file"]) == 1
    assert capsys.readouterr().err.startswith("error: --publish: file/small cannot be made (")


def test_names_that_differ_in_signs_alone_have_pictures_of_their_own(tmp_path):
    datasets = [{**SPEC.to_data()["datasets"][0], "name": name} for name in ("a_b", "a-b", "A-b")]
    scripted_study(StudySpec(**{**SPEC.to_data(), "datasets": datasets}), tmp_path / "three.sqlite", script)
    files = written(tmp_path / "three.sqlite", tmp_path / "docs")
    assert len(set(files.pictures)) == len(files.pictures)
    assert set(files.pictures) == set((tmp_path / "docs" / "small").iterdir())
    shown = re.findall(r"\]\((small/[^)]*\.svg)\)", files.markdown.read_text())
    assert len(shown) == len(set(shown)) == len(files.pictures)


def test_the_task_of_each_problem_is_published(recorded, tmp_path):
    """A report has the score of each task."""
    with Results(recorded) as results:
        asked = Asked.last(results)
        runs = [replace(run, document={**run.document, "task": f"task {run.problem % 2}"}) for run in results.records()]
        told = SimpleNamespace(
            records=lambda keys, outputs: runs, problems=results.problems, meta=results.meta,
            environments=results.environments,
        )  # fmt: skip
        (tmp_path / "tasks.json.gz").write_bytes(published(told, asked, "run"))
    rows = summarise(Published(tmp_path / "tasks.json.gz"))
    assert {task for row in rows for task in row.by_task("exact")} == {"task 0", "task 1"}
