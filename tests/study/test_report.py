"""What reports say, on results files that a script has written: the numbers are known."""

from __future__ import annotations

import json
import math
import re
from html import escape

import pytest

from kvpolicy.study.analysis import tango
from kvpolicy.study.environment import processor
from kvpolicy.study.report.budgets import budget_axis, without_budget
from kvpolicy.study.report.content import Commands, build
from kvpolicy.study.report.drawing import variable
from kvpolicy.study.report.markdown import markdown
from kvpolicy.study.report.phrases import numbers, probability
from kvpolicy.study.results import CellRecord, Results
from kvpolicy.study.spec import StudySpec
from kvpolicy.study.work import Outcome
from kvsupport.scripted import scripted_study

pytest.importorskip("scipy")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

COMMANDS = Commands("kvpolicy study run s.yaml", "kvpolicy study report s.yaml")
NEEDLE = {"use": "needle", "words": 20, "chat": False}


def spec(**fields):
    data = {
        "study": "small",
        "models": ["nowhere"],
        "datasets": [NEEDLE],
        "axes": {"policy": ["rkv", "random"]},
        "conditions": {"budget": [64, 128], "trigger.interval": [16]},
        "samples": 8,
        "metrics": ["exact", "tokens", "bytes_peak"],
    }
    return StudySpec(**{**data, **fields})


RIGHT = {
    ("rkv", 64): [1, 1, 0, 0, 1, 0, 0, 0],
    ("random", 64): [1, 0, 1, 0, 0, 0, 0, 0],
    ("rkv", 128): [1, 1, 1, 1, 1, 1, 0, 0],
    ("random", 128): [1, 1, 1, 1, 1, 1, 1, 1],
    ("full", None): [1, 1, 1, 1, 1, 1, 1, 0],
}


def key(task):
    return task.policy["policy"], task.policy["budget"].get("tokens")


def script(task, item):
    """The table above; a policy holds 10 bytes per entry, and its KL divergence is 1 / budget, half for `random`."""
    policy, budget = key(task)
    metrics = {"bytes_peak": 10.0 * (budget or 200)}
    if task.kind == "generate":
        metrics |= {"exact": float(RIGHT[policy, budget][item.problem.index]), "tokens": 100.0}
    else:
        metrics["kl"] = (0.5 if policy == "random" else 1.0) * (1 + item.problem.index) / budget
    return Outcome(None, metrics, "out", (1, 2, 3), 28)


@pytest.fixture
def made(tmp_path):
    """Return a function that writes a results file and returns the report on it."""

    def make(study=None, says=script):
        study = study or spec()
        path = tmp_path / f"{study.study}.sqlite"
        scripted_study(study, path, says)
        with Results(path) as results:
            return build(results, COMMANDS)

    return make


def page(report):
    from kvpolicy.study.report.page import html

    return html(report)


def test_numbers_of_a_small_study(made):
    report = made()
    assert (report.baseline, report.runs, report.failed) == ("rkv", 40, 0)
    assert (report.budgets.labels, report.budgets.title) == (("64", "128"), "budget, entries per head")
    fewer = made(spec(axes={"policy": ["rkv"]}))
    assert (fewer.runs, fewer.series) == (24, ("rkv",)), "the file keeps the runs of variants that have gone"
    twice = made(spec(study="twice", conditions={"budget": [64, {"trace": 0.5}], "trigger.interval": [16]}))
    assert (twice.runs, len(twice.places[0].entries)) == (24, 4), "runs that two variants share count once"
    (place,) = report.places
    assert (place.model, place.dataset, place.metrics) == ("nowhere", "needle-20", ("exact", "tokens", "bytes_peak"))
    assert place.full.row.metrics["exact"].value == 7 / 8
    lines = place.facets[""]
    values = {name: [entry.row.metrics["exact"].value for entry in points] for name, points in lines.items()}
    assert values == {"rkv": [3 / 8, 6 / 8], "random": [2 / 8, 1.0]}
    assert lines["rkv"][0].row.metrics["exact"].low == pytest.approx(0.1368, abs=1e-3)  # Wilson, 3 of 8
    (measure,) = place.measures
    small, large = (effects[0] for effects in measure.effects.values())
    assert (small.better, small.worse, small.same) == ((2,), (1, 4), (0, 3, 5, 6, 7))
    assert (large.better, large.worse) == ((6, 7), ())
    assert (small.comparison.difference.value, large.comparison.difference.value) == (-1 / 8, 2 / 8)
    assert (small.comparison.p, large.comparison.p) == (1.0, 0.5)  # sign tests of 1 to 2 and 2 to 0
    assert small.swapped == "importance + redundancy + mixer"
    front = [(entry.series, entry.budget) for entry in measure.front]
    assert front == [("rkv", 0), ("random", 1)]
    beaten = {(entry.series, entry.budget) for entry in measure.beaten}
    assert beaten == {("random", 0), ("rkv", 1), ("full", None)}


def test_less_is_better_for_some_metrics(made):
    (place,) = made(spec(datasets=[{**NEEDLE, "forced": True}], metrics=["kl"])).places
    (measure,) = place.measures
    assert [(entry.series, entry.budget) for entry in measure.front] == [("random", 0), ("random", 1)]
    for (effect,) in measure.effects.values():
        assert effect.comparison.difference.value < 0
        assert (effect.verdict, effect.better, effect.worse) == ("better", tuple(range(8)), ())


def test_what_was_swapped_is_named(made):
    def says(task, item):
        return Outcome(None, {"exact": 1.0, "tokens": 9.0, "bytes_peak": 1.0}, "", (1, 2), 9)

    study = spec(
        axes={"mixer.weight": [0.3, 0.5], "importance": ["value_norm", "key_norm"]},
        base="rkv",
        conditions={"budget": [64, 128], "protect.prompt": [False, True]},
    )
    report = made(study, says)
    (place,) = report.places
    assert list(place.facets) == ["protect.prompt=false", "protect.prompt=true"]
    (measure,) = place.measures
    assert len(measure.effects) == 4
    assert [effect.swapped for effect in measure.effects["budget=64, protect.prompt=true"]] == [
        "importance",
        "mixer.weight",
        "mixer.weight + importance",
    ]
    values = [effect.value for effect in measure.effects["budget=64, protect.prompt=true"]]
    assert values == ["key_norm", "0.5", "0.5, key_norm"]
    assert len(list(report.effects("exact"))) == 12


def test_a_variant_has_one_style_everywhere(made):
    policies = ["rkv", "random", "snapkv", "h2o", "tova", "knorm", "keydiff", "recent-pinned", "g-kv", "streaming-llm"]

    def says(task, item):
        return Outcome(None, {"exact": float(item.problem.index % 2), "tokens": 9.0, "bytes_peak": 1.0}, "", (1, 2), 9)

    report = made(spec(axes={"policy": policies}, conditions={"budget": [64, 128]}, samples=2), says)
    assert len(set(report.styles.values())) == len(report.styles) == len(policies)
    assert report.styles["rkv"].colour == -1
    text = page(report)
    (panel,) = re.findall(r"<figure class=\"panel\">.*?</figure>", text, flags=re.DOTALL)[:1]
    assert all(re.search(rf">{name}( \(baseline\))?</text>", panel) for name in policies)
    for name, style in report.styles.items():
        swatch = re.search(rf"<svg class=\"swatch\"((?!</svg>).)*</svg>\s+{name}\s*</th>", text)[0]
        assert style.shape in swatch
        assert variable(style) in swatch
        point = re.search(rf"<title>{name} \(budget=64\): 50.0 \[.*?</a>", panel, flags=re.DOTALL)[0]
        assert variable(style) in point


def test_the_interval_of_a_difference_is_the_same_in_plot_and_table(made):
    report = made()
    effect = next(report.effects("exact"))
    low, high = tango(1, 2, 8)
    assert (effect.comparison.difference.low, effect.comparison.difference.high) == (low, high)
    text = page(report)
    shown = f"[{100 * low:.1f}, {100 * high:.1f}]"
    assert f'-12.5 <span class="interval">{shown}</span>' in text
    assert f"<title>random against rkv: -12.5 {shown} points; 1 better, 2 worse, 5 equal</title>" in text


def test_a_point_leads_to_its_problems(made):
    text = page(made())
    links = set(re.findall(r'<a href="#(by-problem-exact-\d+)"', text))
    assert len(links) == 2
    assert links == set(re.findall(r'<tr id="(by-problem-exact-\d+)"', text))
    assert re.search(r"losses: <a href=\"#problem-0-1\">1</a>, <a href=\"#problem-0-4\">4</a>", text)
    assert '<tr id="problem-0-4"><td>4</td>' in text


def test_a_report_says_when_and_on_what(made):
    report = made()
    measured = report.settings.measured
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", measured.first)
    assert measured.machines == (processor(),)
    assert measured.seconds is None
    for text in (page(report), markdown(report)):
        assert measured.first in text
        assert escape(processor()) in text


def test_a_budget_may_be_an_axis_too(made):
    report = made(spec(axes={"budget": [128, 64]}, base="rkv", conditions={}))
    assert report.budgets.labels == ("64", "128")
    assert {name: [e.budget for e in line] for name, line in report.places[0].facets[""].items()} == {"rkv": [0, 1]}
    assert report.baseline == "budget=128"
    assert "rkv (baseline)" in page(report)


def test_combinations_that_are_left_out_leave_holes(made):
    report = made(spec(exclude=[{"policy": "random", "budget": 64}]))
    assert [len(line) for line in report.places[0].facets[""].values()] == [2, 1]
    assert re.search(r"</svg>\s+random</th><td><span class=\"note\">–</span>", page(report))
    assert "| random | – | 100.0" in markdown(report)


@pytest.mark.parametrize(
    ("texts", "labels", "title"),
    [
        (["30% of the trace", "5% of the trace"], ("5%", "30%"), "% of the full cache's trace"),
        (["0.5", '{"fraction": 0.25}'], ("25%", "50%"), "% of the tokens seen"),
        (["128", "64"], ("64", "128"), "entries per head"),
        (["1048577", "1048576"], ("1048576", "1048577"), "entries per head"),
        (["128", "10% of the trace"], ("128", "10% of the trace"), "budget"),
        (["64"], None, None),
    ],
)
def test_budgets_are_read(texts, labels, title):
    cells = [CellRecord(f"budget={t}, a=1", "", {"budget": t}, "m", "d", None, t, None) for t in texts]
    axis = budget_axis(cells)
    if labels is None:
        assert axis is None
    else:
        assert axis.labels == labels
        assert axis.title.endswith(title)
    assert {without_budget(cell.name, cell) for cell in cells} == {"a=1"}


def test_without_several_budgets_there_is_no_plot_against_them(made):
    text = page(made(spec(conditions={"budget": [64]})))
    assert "The study does not compare budgets" in text
    assert "against the budget on" not in text


def test_a_single_variant_is_compared_with_the_full_cache(made):
    report = made(spec(axes={"policy": ["rkv"]}))
    assert report.baseline == "full"
    (place,) = report.places
    effects = [effect for found in place.measures[0].effects.values() for effect in found]
    assert [effect.comparison.difference.value for effect in effects] == [-4 / 8, -1 / 8]
    assert "Difference to full on the problems that both have, with its 95" in page(report)


def test_one_problem_has_no_intervals(made):
    report = made(spec(samples=1))
    assert math.isnan(report.places[0].entries[0].row.metrics["exact"].low)
    for text in (page(report), markdown(report)):
        assert not re.search(r"\bnan\b", text)


def test_failures_are_said_with_their_reasons(made):
    def says(task, item):
        if key(task) == ("random", 64) or (key(task) == ("rkv", 128) and item.problem.index == 3):
            return Outcome(error="the <b>disk</b> is | full.")
        return script(task, item)

    report = made(says=says)
    assert (report.failed, report.failures) == (9, {"the <b>disk</b> is | full.": 9})
    text = page(report)
    assert "9 × the &lt;b&gt;disk&lt;/b&gt; is | full." in text
    assert "All runs failed: the &lt;b&gt;disk" in text
    assert "1 failed" in text
    lines = markdown(report)
    assert "- 9 × the &lt;b&gt;disk&lt;/b&gt; is \\| full." in lines
    assert "7 (1 failed)" in lines


def test_cells_that_are_not_possible_are_said(made):
    def says(task, item):
        return Outcome(None, {"exact": 1.0, "tokens": 50.0, "bytes_peak": 1.0}, "", (1, 2), 50)

    study = spec(conditions={"budget": [{"trace": 0.02}, {"trace": 0.9}], "trigger.interval": [16]})
    report = made(study, says)
    text = page(report)
    assert "Not possible: " in text
    assert "are fewer than the" in markdown(report)
    assert [entry.row.runs for entry in report.places[0].entries] == [0, 0, 8, 8]


def test_a_study_that_has_not_begun(tmp_path):
    with Results(tmp_path / "s.sqlite", "small") as results:
        results.set_study(spec().to_data(), [], [])
        report = build(results, COMMANDS)
    for text in (page(report), markdown(report)):
        assert "No variant has been run yet" in text


def test_variants_that_have_not_run_yet(made, tmp_path):
    made()
    with Results(tmp_path / "small.sqlite", "small") as results:
        full = results.cells()[0].keys
        results.remove({record.key for record in results.records()} - set(full))
        report = build(results, COMMANDS)
    assert "Not run yet." in page(report)
    assert "not run yet" in markdown(report)
    assert markdown(report).splitlines()[2].startswith("8 runs of the 40 that the study asks for")


def test_several_models_and_datasets_have_their_own_sections(made):
    report = made(spec(models=["a", "b"], datasets=[NEEDLE, {**NEEDLE, "name": "other"}]))
    text = page(report)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == ["needle-20 · a", "other · a", "needle-20 · b", "other · b", "Settings"]
    assert re.findall(r"^## (.*)$", markdown(report), flags=re.MULTILINE) == [
        *("needle-20 · a", "other · a", "needle-20 · b", "other · b", "Settings"),
    ]


EVIL = "<script>alert(1)</script> $x^2$ & | `code` *a*"


def test_texts_mean_nothing_to_the_browser(made, tmp_path):
    rows = [{"question": f"{EVIL} {i}", "answer": EVIL} for i in range(8)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"use": "jsonl", "path": str(tmp_path / "p.jsonl"), "question": "question", "answer": "answer"}
    data |= {"grade": "text", "name": "evil"}
    policies = ["rkv", {"extends": "random", "policy": "random", "description": EVIL}]
    report = made(spec(models=[EVIL], datasets=[data], description=EVIL, axes={"policy": policies}))
    text = page(report)
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10
    table = re.sub(r"^```.*?^```$", "", markdown(report), flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in table
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; $x^2$ &amp; \| \`code\` \*a\*" in table


def test_the_page_is_one_file_with_ids_of_its_own(made):
    text = page(made(spec(datasets=[NEEDLE, {**NEEDLE, "name": "other", "forced": True}], metrics=["exact", "kl"])))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'aria-labelledby="([^"]+)"', text)) <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    assert set(re.findall(r"https?://[^\"' ]*", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"#0[1-6]0[1-6]0[1-9a]", text)  # colours stand in for the page's
    assert text == page(
        made(spec(datasets=[NEEDLE, {**NEEDLE, "name": "other", "forced": True}], metrics=["exact", "kl"]))
    )


def test_settings_are_there_in_full(made):
    report = made()
    text = page(report)
    for part in ("schema_version: 1", "budget: {tokens: 64}", "budget: {tokens: 128}", "0000000000000001", "float64"):
        assert part in text, part
    assert "kvpolicy study run s.yaml\nkvpolicy study report s.yaml" in text
    assert report.settings.facts["seeds"] == "0"
    assert report.settings.environments[0]["scipy"] in text
    assert len(report.settings.problems["needle-20"]) == 8
    assert report.settings.axes == ("policy",)


def test_reports_do_not_say_where_a_machine_keeps_its_texts(made, tmp_path):
    folder = tmp_path / "somewhere" / "texts"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("a b c d " * 40)
    text = {"use": "text", "path": [str(folder / "a.txt")], "tokens": 40, "prompt_tokens": 8}
    report = made(spec(datasets=[text], metrics=["kl"]), lambda task, item: Outcome(metrics={"kl": 0.1}))
    for said in (markdown(report), page(report)):
        assert "texts/a.txt" in said
        assert "somewhere" not in said


def test_markdown_has_whole_tables(made):
    text = markdown(made())
    assert "| rkv | 8 | 37.5 \\[13.7, 69.4\\] | 100.0 | 640 |" in text
    assert "| random | importance + redundancy + mixer | -12.5 \\[" in text
    assert "| 1 / 2 / 5 | – |" in text
    body = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\|\n)+", body, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_phrases():
    assert numbers([3, 1, 2, 7, 9, 10]) == "1–3, 7, 9, 10"
    assert numbers([]) == "–"
    assert [probability(p) for p in (1.0, 0.0312, 0.00002)] == ["1", "0.031", "< 0.001"]
