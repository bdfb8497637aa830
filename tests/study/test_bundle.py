"""`kvpolicy study report --bundle`: one folder with report, problems, traces and data."""

from __future__ import annotations

import csv
import gzip
import json
import re

import pytest

from kvpolicy.cli import main
from kvpolicy.study.records import CellRecord, RunRecord
from kvpolicy.study.report.content import Commands, build
from kvpolicy.study.results import Results
from kvpolicy.study.spec import StudySpec
from kvpolicy.study.work import Outcome
from kvsupport.scripted import scripted_study

pytest.importorskip("scipy")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
parquet = pytest.importorskip("pyarrow.parquet")

EVIL = "<script>alert(1)</script> =1+1\x1b[2J"
SPEC = StudySpec(
    study="small",
    models=["nowhere"],
    datasets=[{"use": "needle", "words": 20, "chat": False, "forced": True}],
    axes={"policy": ["rkv", "random"]},
    conditions={"budget": [64, 128]},
    samples=4,
    seeds=[0, 1],
    metrics=["exact", "kl", "tokens", "bytes_peak", "seconds"],
)


def script(task, item):
    """All answers begin alike; `random` fails on the third problem."""
    policy, number = task.policy["policy"], item.problem.index
    if policy == "random" and number == 3 and task.kind == "generate":
        return Outcome(error=f"out of memory {EVIL}")
    if task.kind == "force":
        return Outcome(None, {"kl": 0.1 * (1 + number), "bytes_peak": 10.0}, "", (), 28)
    metrics = {"exact": float(policy != "random" or number == 0), "tokens": 9.0, "bytes_peak": 10.0, "seconds": 0.5}
    return Outcome(None, metrics, f"First one, then {policy if number else EVIL}.", (1, 2, 3), 28)


@pytest.fixture
def bundle(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    scripted_study(SPEC, tmp_path / "small.sqlite", script)
    assert main(["study", "report", "small.sqlite", "--bundle", "site"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "No traces: name the study, not its results file, for its models have to read.\n"
    files = [path for path in (tmp_path / "site").rglob("*") if path.is_file()]
    assert captured.out == f"Written: site/index.html with {len(files) - 1} other files in site.\n"
    assert not (tmp_path / "small.html").exists()
    return tmp_path / "site"


def test_every_link_leads_to_a_file_of_the_folder(bundle):
    pages = list(bundle.rglob("*.html"))
    assert len(pages) == 1 + 8
    for page in pages:
        text = page.read_text()
        ids = set(re.findall(r'\bid="([^"]+)"', text))
        for link in re.findall(r'\bhref="([^"]+)"', text):
            path, _, mark = link.partition("#")
            assert not re.match(r"[a-z]+:|/", link) or link == "data:,"
            if path and link != "data:,":
                assert (page.parent / path).is_file(), link
            elif mark:
                assert mark in ids, link
        assert not re.search(r"https?://(?!www\.w3\.org/)", text)


def test_a_problem_has_what_was_asked_and_every_text(bundle):
    text = (bundle / "problems/0-1.html").read_text()
    with Results(bundle.parent / "small.sqlite") as results:
        prompt, answer = next((p, a) for p, a in results.problems().values() if p in text.replace("&#39;", "'"))
    assert prompt
    assert f'<strong id="answer">{answer}</strong>' in text
    texts = re.findall(r'<pre data-runs="([\d ]+)">(.*?)</pre>', text)
    assert {said for _, said in texts} == {"First one, then full.", "First one, then rkv.", "First one, then random."}
    runs = re.findall(r"<option[^>]*>(.*?)</option>", text)
    assert runs[:5] == [
        *("full: right", "rkv (budget=64): right", "random (budget=64): wrong"),
        *("rkv (budget=128): right", "random (budget=128): wrong"),
    ]
    assert "Read under teacher forcing" in text


def test_nothing_that_was_generated_becomes_code(bundle):
    for page in bundle.rglob("*.html"):
        text = page.read_text()
        assert "<script>alert" not in text
        if page.parent.name == "problems":
            assert "\x1b" not in text
            assert "default-src 'none'" in text
    assert "Failed: out of memory &lt;script&gt;" in (bundle / "problems/0-3.html").read_text()


def test_marks_lead_to_problems_with_both_texts_chosen(bundle):
    text = (bundle / "index.html").read_text()
    with Results(bundle.parent / "small.sqlite") as results:
        report = build(results, Commands("", ""))
    for effect in report.effects("exact"):
        for number in effect.worse:
            link = f"problems/0-{number}.html#{effect.entry.number}-{effect.base.number}"
            assert f'<a href="{link}" tabindex="-1"><title>problem {number}: worse</title>' in text
            assert f'<a href="{link}">{number}</a>' in text


def test_the_data_are_those_of_the_runs(bundle):
    table = parquet.read_table(bundle / "data/runs.parquet").to_pylist()
    with (bundle / "data/runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        len(rows) == len(table) == 8 * (1 + 2 * 2 + 2 * 2)
    )  # the full cache; two budgets of two policies, answered and read
    for row, other in zip(rows, table, strict=True):
        assert (row["variant"], int(row["problem"]), row["kind"]) == (other["variant"], other["problem"], other["kind"])
        assert (float(row["exact"]) if row["exact"] else None) == other["exact"]
    good = [
        row["exact"]
        for row in table
        if (row["variant"], row["condition"]) == ("random", "budget=64") and row["exact"] is not None
    ]
    with (bundle / "data/means.csv").open(newline="") as file:
        (mean,) = [
            row
            for row in csv.DictReader(file)
            if (row["variant"], row["condition"], row["metric"]) == ("random", "budget=64", "exact")
        ]
    assert float(mean["mean"]) == pytest.approx(sum(good) / len(good))
    assert int(mean["problems"]) == 7
    assert json.loads(gzip.decompress((bundle / "data/small.json.gz").read_bytes()))["study"] == "small"
    assert sorted(path.suffix for path in (bundle / "plots").iterdir()) == [".svg"] * 3


def test_a_published_file_gives_a_bundle_without_texts(bundle, monkeypatch, capsys):
    assert main(["study", "report", str(bundle / "data/small.json.gz"), "--bundle", "again"]) == 0
    text = (bundle.parent / "again/problems/0-1.html").read_text()
    assert "The texts that were generated are not here" in text
    assert re.search(r"random \(budget=<wbr>64\)\s*</th>", text)


def test_traces_are_of_the_recorded_texts(study, tmp_path, monkeypatch, capsys):
    """A tiny model really runs, and reads what it wrote again."""
    monkeypatch.chdir(tmp_path)
    spec = study.make(
        datasets=[{"use": "needle", "words": 20, "chat": False, "forced": True}], metrics=["kl", "tokens"], samples=2
    )
    (tmp_path / "small.yaml").write_text(spec.to_yaml())
    study.run(spec, tmp_path / "small.sqlite")
    assert main(["study", "report", "small.yaml", "--bundle", "site", "--traces", "1"]) == 0
    assert re.search(r"^trace of problem \d of needle-20\.$", capsys.readouterr().err, flags=re.MULTILINE)
    (page,) = (tmp_path / "site/traces").iterdir()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), flags=re.DOTALL)[1])
    assert [trace["policy"] for trace in data["traces"]] == ["random", "rkv"]
    assert "every 16 tokens" in data["traces"][0]["details"]
    with Results(tmp_path / "small.sqlite") as results:
        outputs = {record.output for record in results.records() if record.kind == "generate"}
    for trace in data["traces"]:
        assert "".join(trace["texts"][trace["prompt"] :]) in outputs
        assert trace["compactions"][2] > 0
    number = page.stem.split("-")[2]
    assert f'href="../traces/{page.name}"' in (tmp_path / f"site/problems/0-{number}.html").read_text()


def test_a_trace_is_of_the_first_seed_that_did_not_fail():
    pytest.importorskip("torch")
    from kvpolicy.trace.bundled import answer_of

    def run(key, seed, *, error=None, kind="generate", problem=3):
        return RunRecord(key, kind, "m", "d", problem, seed, "p", error, {}, 9)

    found = {
        "a": run("a", 0, error="no memory."), "b": run("b", 2), "c": run("c", 1), "d": run("d", 0, kind="force"),
        "e": run("e", 0, problem=4),
    }  # fmt: skip
    cell = CellRecord("rkv", "", {}, "m", "d", "", "p", None, keys=tuple(found))
    assert answer_of(cell, 3, found).key == "c"
