"""The HTML page of a report: one file, which needs nothing else and runs no script."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from kvpolicy.study.extra import library
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.report import phrases
from kvpolicy.study.report.content import SIGNIFICANT, Effect, Measure, Place, Report
from kvpolicy.study.report.plots import budget_plots, forest_plot, front_plot

_OPEN_ROWS: Final = 30  # a longer table is folded
_PER_LINE: Final = 100
_STEP, _HEIGHT = 4, 16  # px of a problem in a strip


def html(report: Report) -> str:
    """Return the page.

    Args:
        report: what it says.

    Raises:
        KVPolicyError: jinja2 or matplotlib is not installed.
    """
    jinja2 = library("jinja2", "the page of a report needs")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kvpolicy.study.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        {name: getattr(phrases, name) for name in ("value", "interval", "bounds", "probability", "numbers", "title")}
    )
    environment.filters["breakable"] = _breakable
    text: str = environment.get_template("page.html.j2").render(
        report=report,
        plots={
            (p, m): _plots(report, place, measure, f"plot-{p}-{m}")
            for p, place in enumerate(report.places)
            for m, measure in enumerate(place.measures)
        },
        metrics=METRICS,
        headlines=list(_headlines(report)),
        several_models=len({place.model for place in report.places}) > 1,
        significant=SIGNIFICANT,
        strip=_strip,
        count=phrases.count,
        open_rows=_OPEN_ROWS,
    )
    return text


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
    budget = list(budget_plots(report, place, measure, f"{name}-budget")) if report.budgets is not None else []
    if all(len(facet) == 1 for facet in budget):  # then facets stand side by side
        budget = [[plot for facet in budget for plot in facet]] if budget else []
    return {
        "budget": budget,
        "front": [front_plot(place, measure, f"{name}-front")] if len(measure.front) + len(measure.beaten) > 1 else [],
        "forest": [
            forest_plot(effects, f"{name}-forest-{i}", " · ".join(filter(None, (place.dataset, condition))))
            for i, (condition, effects) in enumerate(measure.effects.items())
        ],
    }


def _strip(effect: Effect) -> dict[str, object]:
    """Return the drawing of a comparison problem by problem: size in px, and an SVG path for each outcome.

    A line up is a problem on which the variant is better, a line down one on which it is worse, a dot one on which
    nothing changes.
    """
    order = sorted((*effect.better, *effect.worse, *effect.same))
    place = {number: divmod(i, _PER_LINE) for i, number in enumerate(order)}

    def path(chosen: tuple[int, ...], start: int, line: str) -> str:
        at = ((_STEP * column + 2, _HEIGHT * row + start) for row, column in map(place.__getitem__, chosen))
        return "".join(f"M{x:g} {y}{line}" for x, y in at)

    return {
        "width": _STEP * min(len(order), _PER_LINE),
        "height": _HEIGHT * -(-len(order) // _PER_LINE),
        "better": path(effect.better, 8, "v-7"),
        "worse": path(effect.worse, 8, "v7"),
        "same": path(effect.same, 7, "v2"),
    }
