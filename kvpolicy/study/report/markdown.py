"""The Markdown of a report: tables to publish, settings folded away."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvpolicy.study.analysis import Estimate, shown
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.report import phrases
from kvpolicy.study.report.content import BYTES, SIGNIFICANT, Measure, Place, Report, VariantEntry
from kvpolicy.study.report.settings import Measured, StudySettings

_SPECIAL: Final = re.compile(r"([\\`*_\[\]|~#])")
_DASH: Final = "–"


@dataclass(frozen=True)
class Picture:
    """A picture beside the Markdown.

    Attributes:
        path: from the folder of the Markdown.
        title: what it shows.
    """

    path: str
    title: str


Pictures = Mapping[tuple[str, str, str], Sequence[Picture]]
"""(model, dataset, metric) -> pictures."""


def markdown(report: Report, pictures: Pictures | None = None, data: str = "") -> str:
    """Return the report as GitHub's Markdown.

    Args:
        report: what it says.
        pictures: what lies beside it.
        data: name of the file beside it that has all numbers; empty if there is none.
    """
    told = f"The numbers of all runs are in [{data}]({data}); `kvpolicy study report {data}` makes a page of them."
    lines = [f"# {_text(report.study)}", ""]
    if report.description:
        lines += [_text(report.description), ""]
    lines += [
        f"{phrases.count(report.runs, 'run')}{_unfinished(report)}; differences are to {_text(report.baseline)}.",
        *([f"{_text(report.older)}."] if report.older else []),
        "Intervals are at 95 % and about problems: Wilson's for shares of right answers, a bootstrap for other means.",
        *_measured(report.settings.measured),
        *([told] if data else []),
        "",
    ]
    if report.refusals:
        lines += ["**Not graded**", "", *(f"- {_text(sentence)}" for sentence in report.refusals), ""]
    if report.cuts:
        lines += ["**Answers were cut**", "", *(f"- {_text(sentence)}" for sentence in report.cuts), ""]
    if report.failures:
        lines += ["**Not everything could be run:**", ""]
        lines += [f"- {number} × {_text(reason)}" for reason, number in report.failures.items()] + [""]
    if not report.places:
        lines += ["No variant has been run yet; the full cache comes first.", ""]
    for place in report.places:
        lines += [f"## {_text(place.dataset)} · {_text(place.model)}", ""]
        lines += _overview(place)
        lines += _by_task(place)
        for measure in place.measures:
            shown = (pictures or {}).get((place.model, place.dataset, measure.metric), ())
            lines += _measure(report, place, measure, shown)
    lines += _settings(report)
    return "\n".join(lines).rstrip() + "\n"


def _unfinished(report: Report) -> str:
    return f" of the {report.asked:,} that the study asks for" if report.runs < report.asked else ""


def _overview(place: Place) -> Iterator[str]:
    """Yield a table for each condition; the full cache begins each, so that it can be read alone."""
    head = ["variant", "runs", *(METRICS[name].heading for name in place.metrics)]
    for condition, entries in place.conditions.items():
        if condition:
            yield from (f"**{_text(condition)}**", "")
        chosen = ([place.full] if place.full is not None else []) + list(entries)
        yield from _table(head, (_row(entry, place.metrics) for entry in chosen), left=1)


def _by_task(place: Place) -> Iterator[str]:
    """Yield a table of the first metric of quality for each task, of a dataset that has several."""
    if not place.tasks:
        return
    metric = place.measures[0].metric
    entries = [*([] if place.full is None else [place.full]), *place.entries]
    yield from (f"### {phrases.title(metric)}, by task", "")
    rows = []
    for entry in entries:
        means = entry.row.by_task(metric)
        cells = [phrases.value(means[task], metric) if task in means else _DASH for task in place.tasks]
        rows.append([_text(entry.row.cell.name), _text(entry.row.cell.condition) or _DASH, *cells])
    yield from _table(["variant", "condition", *map(_text, place.tasks)], rows, left=2)


def _row(entry: VariantEntry, metrics: Sequence[str]) -> list[str]:
    row = entry.row
    if row.runs == 0:
        reason = f"failed: {row.error}" if row.failed else f"not possible: {row.error}" if row.error else "not run yet"
        return [_text(row.cell.name), _text(reason), *(_DASH for _ in metrics)]
    runs = f"{row.runs:,}" + (f" ({row.failed} failed)" if row.failed else "")
    runs += f" of {row.runs + row.failed + row.missing:,}" if row.missing else ""
    return [_text(row.cell.name), runs, *(_estimate(row.metrics.get(name), name) for name in metrics)]


def _measured(measured: Measured) -> Iterator[str]:
    if measured.first:
        days = measured.first if measured.first == measured.last else f"{measured.first} to {measured.last}"
        time = f", {phrases.duration(measured.seconds)} of computing" if measured.seconds else ""
        machines = f" on {_text('; '.join(measured.machines))}" if measured.machines else ""
        yield f"Measured {days}{machines}{time}."


def _measure(report: Report, place: Place, measure: Measure, pictures: Sequence[Picture]) -> Iterator[str]:
    metric = measure.metric
    yield from (f"### {phrases.title(metric)}", "")
    for picture in pictures:
        yield from (f"![{_text(picture.title)}]({picture.path})", "")
    for facet, lines in place.facets.items() if report.budgets is not None else ():
        budgets = report.budgets.labels if report.budgets is not None else ()
        axis = _text(report.budgets.title) if report.budgets is not None else ""
        yield from (f"{_text(facet) + '; ' if facet else ''}{METRICS[metric].heading}; {axis}", "")
        rows = [[_text(series), *_by_budget(points, len(budgets), metric)] for series, points in lines.items()]
        if place.full is not None and metric in place.full.row.metrics:
            rows.insert(0, ["full cache", *(_estimate(place.full.row.metrics[metric], metric) for _ in budgets)])
        yield from _table(["variant", *map(_text, budgets)], rows, left=1)
    if len(measure.front) + len(measure.beaten) > 1:
        yield from ("**Pareto front against bytes** (means)", "")
        yield from _table(
            ["variant", "condition", METRICS[metric].heading, "bytes"],
            (
                [
                    *(_text(entry.row.cell.name), _text(entry.row.cell.condition) or _DASH),
                    *(_estimate(entry.row.metrics[metric], metric), phrases.value(entry.row.metrics[BYTES], BYTES)),
                ]
                for entry in measure.front
            ),
            left=2,
        )
    for condition, effects in measure.effects.items():
        yield from (f"**Difference to {_text(report.baseline)}**{': ' + _text(condition) if condition else ''}", "")
        head = [
            "variant",
            "what differs",
            METRICS[metric].difference,
            "p",
            "p, Holm",
            "wins / losses / ties",
            "verdict",
        ]
        rows = [
            [
                *(_text(effect.comparison.cell.name), _text(effect.swapped)),
                _estimate(effect.comparison.difference, metric),
                *(_text(phrases.probability(p)) for p in (effect.comparison.p, effect.comparison.p_holm)),
                f"{len(effect.better)} / {len(effect.worse)} / {len(effect.same)}",
                effect.verdict or _DASH,
            ]
            for effect in effects
        ]
        yield from _table(head, rows, left=2)
    if measure.effects:
        count = phrases.count(len(list(report.effects(metric))), "comparison")
        yield f"Intervals of differences are {phrases.method_of(measure)}."
        yield from (f"Holm's correction is for all {count} of this metric; the verdict is at {SIGNIFICANT}.", "")


def _by_budget(points: Sequence[VariantEntry], budgets: int, metric: str) -> list[str]:
    at = {entry.budget: entry.row.metrics.get(metric) for entry in points}
    return [_estimate(at.get(i), metric) for i in range(budgets)]


def _settings(report: Report) -> Iterator[str]:
    made: StudySettings = report.settings
    yield from ("## Settings", "")
    yield from _fenced(f"{report.commands.run}\n{report.commands.report}", "")
    yield from _table(["field", "value"], ([_text(k), _text(v)] for k, v in made.facts.items()), left=2)
    fields = ("name", "fingerprint", "revision", "dtype", "device")
    yield from _table(
        ["model", *fields[1:]],
        ([_text(str(model.get(field) or _DASH)) for field in fields] for model in made.models),
        left=len(fields),
    )
    for environment in made.environments:
        yield "Made with " + ", ".join(f"{_text(name)} {_text(str(v))}" for name, v in environment.items() if v) + "."
        yield ""
    yield from (f"The report was made by kvpolicy {made.version}.", "")
    if made.study:
        yield from _folded("The study as it ran", _fenced(made.study, "yaml"))
    for name, files in made.policies.items():
        # Those of the other budgets and conditions would make the file too long for sites that show Markdown.
        first = next((file for file in files if file.text is not None), files[0])
        where = f": {first.places[0]}" if len(files) > 1 and first.places[0] else ""
        text = _fenced(first.text, "yaml") if first.text else (_text(f"Not possible: {first.error}"), "")
        yield from _folded(f"Policy {name}{where}", text)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> Iterator[str]:
    """Yield a table and an empty line; nothing without rows. The first `left` columns are texts."""
    found = list(rows)
    if found:
        yield _line(head)
        yield _line(["---" if i < left else "---:" for i in range(len(head))])
        yield from map(_line, found)
        yield ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _folded(summary: str, lines: Iterable[str]) -> Iterator[str]:
    yield from ("<details>", f"<summary>{html.escape(summary)}</summary>", "")
    yield from lines
    yield from ("</details>", "")


def _fenced(text: str, language: str) -> Iterator[str]:
    """Yield a block of code, with a fence longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield from (f"{fence}{language}", text.rstrip("\n"), fence, "")


def _estimate(estimate: Estimate | None, metric: str) -> str:
    """Return an estimate, with its interval where the metric says how good a variant is."""
    if estimate is None:
        return _DASH
    return _brackets(shown(estimate, metric) if METRICS[metric].quality else phrases.value(estimate, metric))


def _brackets(text: str) -> str:
    return text.replace("[", "\\[").replace("]", "\\]")


def _text(text: str) -> str:
    """Return text on one line in which neither Markdown nor HTML means anything."""
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))
