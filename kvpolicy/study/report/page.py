"""The HTML page of a report: one file, which needs nothing else and runs no script."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvpolicy.study.extra import library
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.report import phrases
from kvpolicy.study.report.content import SIGNIFICANT, Effect, Measure, Place, Report
from kvpolicy.study.report.drawing import PALETTE, variable
from kvpolicy.study.report.forest import forest_plot
from kvpolicy.study.report.plots import budget_plots, front_plot

_OPEN_ROWS: Final = 30  # a longer table is folded
_PER_LINE: Final = 100
_STEP, _HEIGHT = 4, 16  # px of a problem in a strip
_SAID: Final[Mapping[str, str]] = {"up": "better", "down": "worse", "level": "equal"}


@dataclass(frozen=True)
class ProblemLinks:
    """Where the problems of a comparison are.

    Attributes:
        to: link to a problem, given its place and its number, and the comparison that asks.
        marks: also link every mark of the drawings, which makes a page longer.
        sentence: what there is.
    """

    to: Callable[[Place, int, Effect], str]
    marks: bool
    sentence: str


def within(report: Report) -> ProblemLinks:
    """Return links to the list of problems that the page itself ends with."""
    datasets = {dataset: i for i, dataset in enumerate(report.settings.problems)}

    def to(place: Place, number: int, effect: Effect) -> str:  # noqa: ARG001 - whoever asks, it is one list
        return f"#problem-{datasets.get(place.dataset, 0)}-{number}"

    return ProblemLinks(to, marks=False, sentence="Numbers lead to what was asked.")


def html(report: Report, problems: ProblemLinks | None = None) -> str:
    """Return the page.

    Args:
        report: what it says.
        problems: where its problems are; in the page itself if None.

    Raises:
        KVPolicyError: jinja2 or matplotlib is not installed.
    """
    links = problems or within(report)
    text: str = (
        templates()
        .get_template("page.html.j2")
        .render(
            report=report,
            palette=palette(),
            plots={
                (p, m): _plots(report, place, measure, f"plot-{p}-{m}")
                for p, place in enumerate(report.places)
                for m, measure in enumerate(place.measures)
            },
            metrics=METRICS,
            headlines=list(_headlines(report)),
            several_models=len({place.model for place in report.places}) > 1,
            significant=SIGNIFICANT,
            strip=lambda effect, place: _strip(effect, place, links),
            linked=lambda numbers, effect, place: _linked(numbers, effect, place, links),
            method=phrases.method_of,
            where_problems_lead=links.sentence,
            count=phrases.count,
            open_rows=_OPEN_ROWS,
        )
    )
    return text


def templates() -> Any:
    """Return jinja2's environment for the pages of reports; raises KVPolicyError if it is not installed."""
    jinja2 = library("jinja2", "the page of a report needs")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvpolicy.study.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("value", "interval", "probability", "title", "duration")
    environment.filters.update({name: getattr(phrases, name) for name in names})
    environment.filters.update({"breakable": _breakable, "variable": variable, "multiply": lambda a, b: f"{a * b:g}"})
    return environment


def palette() -> str:
    """Return the colours of the page and of its plots as CSS variables, on light and on dark paper."""
    light, dark = (" ".join(f"{name}: {pair[i]};" for name, pair in PALETTE.items()) for i in (0, 1))
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def _linked(numbers: Sequence[int], effect: Effect, place: Place, links: ProblemLinks) -> Any:
    """Return the numbers of problems, each leading to its problem; a dash if there are none."""
    markupsafe = library("markupsafe", "the page of a report needs")
    one = markupsafe.Markup('<a href="{}">{}</a>')
    return markupsafe.Markup(", ").join(one.format(links.to(place, n, effect), n) for n in sorted(numbers)) or "–"


def _breakable(name: str) -> Any:
    """Return a variant's name, escaped, that may be broken after ``=``."""
    markupsafe = library("markupsafe", "the page of a report needs")
    return markupsafe.escape(name).replace("=", markupsafe.Markup("=<wbr>"))


def _headlines(report: Report) -> Iterator[tuple[str, str]]:
    """Yield how many differences of each metric stand after the correction."""
    for metric in dict.fromkeys(measure.metric for place in report.places for measure in place.measures):
        effects = list(report.effects(metric))
        if effects:
            better, worse = (sum(e.verdict == verdict for e in effects) for verdict in ("better", "worse"))
            text = f"{phrases.count(len(effects), 'comparison')}: {better} better, {worse} worse, "
            yield (
                metric,
                f"{text}{len(effects) - better - worse} undecided at p < {SIGNIFICANT} after Holm's correction",
            )


def _plots(report: Report, place: Place, measure: Measure, name: str) -> dict[str, Any]:
    several = len(measure.front) + len(measure.beaten) > 1
    return {
        "budget": list(budget_plots(report, place, measure, f"{name}-budget")) if report.budgets is not None else [],
        "front": [front_plot(report, place, measure, f"{name}-front")] if several else [],
        "forest": [
            forest_plot(report, effects, f"{name}-forest-{i}", " · ".join(filter(None, (place.dataset, condition))))
            for i, (condition, effects) in enumerate(measure.effects.items())
        ],
    }


def _strip(effect: Effect, place: Place, links: ProblemLinks) -> dict[str, object]:
    """Return the drawing of a comparison problem by problem: size in px, and SVG paths.

    A line up is a problem on which the variant is better, a line down one on which it is worse, a dot one on which
    nothing changes. There is a path for each kind, or one for each problem where marks are links.
    """
    order = sorted((*effect.better, *effect.worse, *effect.same))
    spots = {number: divmod(i, _PER_LINE) for i, number in enumerate(order)}
    kinds = {"up": (effect.better, 8, "v-7"), "down": (effect.worse, 8, "v7"), "level": (effect.same, 7, "v2")}

    def path(number: int, start: int, line: str) -> str:
        row, column = spots[number]
        return f"M{_STEP * column + 2} {_HEIGHT * row + start}{line}"

    marks = [
        {
            "kind": kind,
            "path": path(number, start, line),
            "x": _STEP * spots[number][1],
            "y": _HEIGHT * spots[number][0],
            "link": links.to(place, number, effect),
            "text": f"problem {number}: {_SAID[kind]}",
        }
        for kind, (chosen, start, line) in kinds.items()
        for number in chosen
        if links.marks
    ]
    return {
        "width": _STEP * min(len(order), _PER_LINE),
        "height": _HEIGHT * -(-len(order) // _PER_LINE),
        "marks": marks,
        **{
            kind: "" if links.marks else "".join(path(number, start, line) for number in chosen)
            for kind, (chosen, start, line) in kinds.items()
        },
    }
