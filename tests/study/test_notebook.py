"""A study from Python: run in this process, shown as a table and a figure."""

from __future__ import annotations

import pytest

from kvpolicy import KVPolicyError
from kvpolicy.study.notebook import NotebookBar, StudyTable, run_study


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_folder):
    from kvpolicy.study.spec import StudySpec

    spec = StudySpec(
        study="small", models=[str(model_folder)], datasets=[{"use": "needle", "words": 20, "chat": False}],
        axes={"policy": ["rkv", "random"]}, conditions={"budget": [64], "trigger.interval": [16]}, samples=3,
        sampling={"max_new_tokens": 30}, batch=4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("study") / "small.sqlite"
    return spec, path, run_study(spec, path, device="cpu", progress=False)


def test_it_runs_once_and_shows_a_table(made):
    spec, path, table = made
    assert table.study == "small"
    assert [row.cell.name for row in table.rows] == ["full", "rkv", "random"]
    assert all(row.runs == 3 and not row.missing for row in table.rows)
    again = run_study(spec, path, device="cpu", progress=False)
    assert [row.metrics for row in again.rows] == [row.metrics for row in table.rows]
    assert repr(table).count("\n") == 0
    page = table._repr_html_()
    assert page.count("<tr>") == 1 + len(table.rows) + 1  # and what was cut: the answers of a tiny model have no end
    assert "3 of 3 answers of the full cache" in page
    assert "rkv" in page


def test_the_table_is_text_records_and_latex(made):
    table = made[2]
    first, *lines = str(table).splitlines()
    assert first == "Study: small"
    assert len(lines) == 1 + len(table.rows) + 1
    assert "were cut there" in lines[-1]
    records = table.records()
    assert [each["exact"] for each in records] == [row.metrics["exact"].value for row in table.rows]
    assert all(each["exact_low"] <= each["exact"] <= each["exact_high"] for each in records)
    text = table.latex("resident_mean")
    assert text.startswith("% ")
    assert r"\begin{tabular}{lr}" in text
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    assert [line.split(" & ")[0] for line in body] == [row.cell.name.replace("_", r"\_") for row in table.rows]
    assert all(line.endswith(r" \\") for line in body)
    with pytest.raises(KVPolicyError, match="latex: 'nothing' has not been measured"):
        table.latex("nothing")


def test_latex_has_a_column_for_each_condition_and_the_full_cache_in_all():
    from types import SimpleNamespace

    from kvpolicy.study.analysis import Estimate

    def row(name, condition, value):
        cell = SimpleNamespace(name=name, condition=condition, model="m", dataset="d_1")
        return SimpleNamespace(cell=cell, metrics={"exact": Estimate(value, value, value, 4)})

    rows = (row("full", "", 1.0), row("a_b", "budget=30% of the trace", 0.5), row("a_b", "budget=64", 0.25))
    text = StudyTable("s", None, rows, ("exact",)).latex()
    assert r"variant & budget=30\% of the trace & budget=64 \\" in text
    assert r"full & 100.0 [100.0, 100.0] & 100.0 [100.0, 100.0] \\" in text
    assert r"a\_b & 50.0 [50.0, 50.0] & 25.0 [25.0, 25.0] \\" in text


def test_a_figure_has_a_point_for_every_row(made):
    pytest.importorskip("matplotlib")
    table = made[2]
    axes = table.plot("exact").axes[0]
    assert len(axes.get_yticklabels()) == len([row for row in table.rows if "exact" in row.metrics])
    with pytest.raises(KVPolicyError, match="'nothing' has not been measured; this study measured exact"):
        table.plot("nothing")


def test_the_bar_goes_through_stages(capsys):
    bar = NotebookBar()
    bar.begin("full cache", 2, 10)
    bar.advance([1, 2], [], 10)
    bar.begin("variants", 0, 0)
    bar.advance([], [], 0)
    bar.close()
    assert "full cache" in capsys.readouterr().err
    hidden = NotebookBar(hidden=True)
    hidden.begin("full cache", 2, 10)
    hidden.advance([1], [], 5)
    assert capsys.readouterr().err == ""


def test_what_is_no_results_file_is_refused(tmp_path):
    with pytest.raises(KVPolicyError, match="there is no such file"):
        StudyTable.read(tmp_path / "none.sqlite")
