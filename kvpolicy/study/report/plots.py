"""The plots of a report, each of them twice: for a screen or a projector, and for a telephone."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvpolicy.study.analysis import Estimate, shown
from kvpolicy.study.extra import library
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.report import phrases
from kvpolicy.study.report.budgets import BudgetAxis
from kvpolicy.study.report.content import BYTES, Measure, Place, Report, VariantEntry
from kvpolicy.study.report.drawing import BAND, INK, MUTED, PAPER, Canvas, Plot, Tip, colour, figure, plot
from kvpolicy.study.report.labels import Box, beside_points, spread, wrapped
from kvpolicy.study.report.styles import BASELINE

_TOGETHER: Final = 24
"""Most variants of one plot: more names than that no side of a plot can hold."""
_LEGEND_WIDTH, _NAME_WIDTH = 52, 30  # characters
_LOGARITHMIC: Final = 8  # an axis whose ends are this far apart has equal steps for equal factors
_AT_A_POINT: Final = 3  # names of variants that stand in one place
_UNITS: Final = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@dataclass(frozen=True)
class Pair:
    """The same plot twice: for a wide window, and for a narrow one."""

    wide: Plot
    narrow: Plot


def budget_plots(report: Report, place: Place, measure: Measure, name: str) -> Iterator[Pair]:
    """Yield the plots of a metric against the budget, facet by facet, all variants together.

    Args:
        report: with budgets.
        place: a dataset with a model.
        measure: one of its measures.
        name: begins the plots' ids.
    """
    assert report.budgets is not None
    others = [series for series in report.series if series != report.baseline_series]
    groups = [others[i : i + _TOGETHER] for i in range(0, len(others), _TOGETHER)] or [[]]
    for i, (facet, lines) in enumerate(place.facets.items()):
        drawn = {
            series: [entry for entry in points if measure.metric in entry.row.metrics]
            for series, points in lines.items()
        }
        drawn = {series: points for series, points in drawn.items() if points}
        for j, group in enumerate(groups):
            here = [series for series in (report.baseline_series, *group) if series in drawn]
            if not here or (j > 0 and here == [report.baseline_series]):
                continue
            part = f"variants {j + 1} of {len(groups)}" if len(groups) > 1 else ""
            caption = " · ".join(filter(None, (facet, part)))
            title = f"{METRICS[measure.metric].title} against the budget on {place.dataset}"
            title += f" ({caption})" if caption else ""
            chosen = {series: drawn[series] for series in here}
            wide, narrow = (
                _budget_plot(report, place, measure.metric, chosen, (f"{name}-{i}-{j}-{size}", title, caption))
                for size in ("w", "n")
            )
            yield Pair(wide, narrow)


def _budget_plot(
    report: Report, place: Place, metric: str, drawn: dict[str, list[VariantEntry]], called: tuple[str, str, str]
) -> Plot:
    wide = called[0].endswith("w")
    rows = sum(len(wrapped(series, _NAME_WIDTH if wide else _LEGEND_WIDTH)) for series in (*drawn, "full cache"))
    height = max(5.2, 0.9 + 0.21 * rows) if wide else 3.2 + 0.17 * rows
    with figure(height, wide=wide) as canvas:
        ends = _budgets(canvas, report, place, metric, drawn)
        canvas.axes.set_ylim(*_limits(place, metric))
        if wide:
            _names_beside(canvas, ends)
        else:
            canvas.whole.legend(loc="outside lower left", ncols=1, handlelength=3.2, labelspacing=0.35)
        return plot(canvas, *called)


@dataclass(frozen=True)
class _End:
    """The last point of a line, and the name that belongs there; `x` is None for the right edge."""

    x: float | None
    y: float
    name: str
    colour: str


def _budgets(
    canvas: Canvas, report: Report, place: Place, metric: str, drawn: dict[str, list[VariantEntry]]
) -> list[_End]:
    assert report.budgets is not None
    ends = []
    axes, scale, wide = canvas.axes, METRICS[metric].scale, canvas.wide
    positions = _positions(report.budgets)
    if place.full is not None and metric in place.full.row.metrics:
        whole = place.full.row.metrics[metric]
        if not math.isnan(whole.low) and whole.high > whole.low:
            axes.axhspan(scale * whole.low, scale * whole.high, color=BAND, linewidth=0, zorder=0.5)
        axes.axhline(scale * whole.value, color=MUTED, linewidth=1.1, zorder=0.6, label="full cache and its interval")
        ends.append(_End(None, scale * whole.value, "full cache", MUTED))
    steps = [b - a for a, b in itertools.pairwise(positions)]
    aside = min(0.035, 0.3 / len(drawn)) * min(steps)
    for i, (series, points) in enumerate(drawn.items()):
        style = report.styles[series]
        estimates = [entry.row.metrics[metric] for entry in points]
        places = [positions[entry.budget or 0] + (i - (len(drawn) - 1) / 2) * aside for entry in points]
        values = [scale * estimate.value for estimate in estimates]
        order = 3 if style == BASELINE else 2
        name = f"{series} (baseline)" if series == report.baseline_series else series
        ends.append(_End(places[-1], values[-1], name, colour(style)))
        axes.errorbar(
            places,
            values,
            yerr=errors(estimates, scale),
            label="\n".join(wrapped(name, _LEGEND_WIDTH)),
            color=colour(style),
            marker=style.marker,
            markersize=6 if wide else 5,
            linestyle=style.line,
            linewidth=(2.2 if wide else 1.8) if style == BASELINE else (1.8 if wide else 1.5),
            elinewidth=0.9,
            zorder=order,
        )
        look = {"marker": style.marker, "markersize": 6 if wide else 5, "color": colour(style), "zorder": order + 0.1}
        for entry, x, y in zip(points, places, values, strict=True):
            canvas.point(x, y, look, _tip(report, entry, metric))
    axes.set_xticks(positions, report.budgets.labels)
    axes.margins(x=0.02 if wide else 0.06)
    axes.set_xlabel(report.budgets.title)
    axes.set_ylabel("\n".join(textwrap.wrap(METRICS[metric].heading, 40 if wide else 32)))
    return ends


def _names_beside(canvas: Canvas, ends: Sequence[_End]) -> None:
    """Write each variant's name beside its last point, and draw a line from one to the other."""
    axes = canvas.axes
    canvas.whole.get_layout_engine().execute(canvas.whole)  # only then is it known how high the axes are
    height = axes.get_window_extent().height * 72 / canvas.whole.dpi
    low, high = axes.get_ylim()
    names = ["\n".join(wrapped(end.name, _NAME_WIDTH)) for end in ends]
    shares = [(end.y - low) / (high - low) for end in ends]
    sizes = [1.22 * 12 * (1 + name.count("\n")) / height for name in names]
    to_axes = axes.transData + axes.transAxes.inverted()
    for end, name, share, at in zip(ends, names, shares, spread(shares, sizes, -0.08, 1.06), strict=True):
        x = 1.0 if end.x is None else to_axes.transform((end.x, end.y))[0]
        line = {"transform": axes.transAxes, "color": end.colour, "clip_on": False}
        axes.plot([x, 1.015, 1.035], [share, at, at], linewidth=0.8, alpha=0.7, zorder=1, **line)
        axes.text(1.042, at, name, fontsize=12, va="center", linespacing=1.05, **line)


def _tip(report: Report, entry: VariantEntry, metric: str) -> Tip:
    cell = entry.row.cell
    where = f" ({cell.condition})" if cell.condition else ""
    unit = " %" if METRICS[metric].percent else ""
    text = f"{cell.name}{where}: {shown(entry.row.metrics[metric], metric)}{unit}"
    return Tip(text, report.link(entry, metric))


def _positions(budgets: BudgetAxis) -> list[float]:
    places = list(budgets.positions)
    if min(places) > 0 and max(places) / min(places) >= _LOGARITHMIC:
        return [math.log2(place) for place in places]
    return places


def _limits(place: Place, metric: str) -> tuple[float, float]:
    """Return the same limits for all plots of a metric, so that they can be compared."""
    scale = METRICS[metric].scale
    entries = [*place.entries, *([place.full] if place.full is not None else [])]
    ends = [
        scale * end
        for entry in entries
        if (found := entry.row.metrics.get(metric)) is not None
        for end in (found.value, found.low, found.high)
        if not math.isnan(end)
    ]
    room = 0.05 * (max(ends) - min(ends)) or 0.05 * abs(ends[0]) or 0.5
    return min(ends) - room, max(ends) + room


def front_plot(report: Report, place: Place, measure: Measure, name: str) -> Pair:
    """Return the plot of a metric against bytes, with the front as a line of steps.

    Args:
        report: says how variants are drawn.
        place: a dataset with a model.
        measure: one of its measures, with a front.
        name: begins the plot's ids.
    """
    title = f"{METRICS[measure.metric].title} against bytes of keys and values on {place.dataset}"
    return Pair(
        _front(report, place, measure, f"{name}-w", title, wide=True),
        _front(report, place, measure, f"{name}-n", f"{title}; numbers as in the table", wide=False),
    )


def _front(report: Report, place: Place, measure: Measure, name: str, title: str, *, wide: bool) -> Plot:
    metric, scale = measure.metric, METRICS[measure.metric].scale
    sizes = [entry.row.metrics[BYTES].value for entry in (*measure.front, *measure.beaten)]
    unit, word = next(((unit, word) for unit, word in _UNITS if max(sizes) >= unit), (1, "bytes"))

    def at(entry: VariantEntry) -> tuple[float, float]:
        return entry.row.metrics[BYTES].value / unit, scale * entry.row.metrics[metric].value

    with figure(5.2 if wide else 3.2, wide=wide) as canvas:
        axes = canvas.axes
        places, values = ([at(entry)[i] for entry in measure.front] for i in (0, 1))
        intervals = errors([entry.row.metrics[metric] for entry in measure.front], scale)
        axes.step(places, values, where="post", color=INK, linewidth=1.6, zorder=1.5)
        axes.errorbar(places, values, yerr=intervals, linestyle="", color=INK, elinewidth=0.9, zorder=1.6)
        for entry in (*measure.beaten, *measure.front):
            style = report.style_of(entry)
            ahead = entry in measure.front
            look = {
                "marker": style.marker,
                "markersize": (8 if ahead else 5.5) if wide else (7 if ahead else 4.5),
                "color": colour(style),
                "markerfacecolor": colour(style) if ahead or entry is place.full else PAPER,
                "zorder": 3 if ahead else 2,
            }
            canvas.point(*at(entry), look, _with_bytes(_tip(report, entry, metric), entry))
        if min(sizes) > 0 and max(sizes) / min(sizes) >= _LOGARITHMIC:
            ticker = library("matplotlib.ticker", "the plots of a report need")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.margins(x=0.08, y=0.12)
        axes.set_xlabel(f"keys and values of a row, at most, {word}")
        axes.set_ylabel("\n".join(textwrap.wrap(METRICS[metric].heading, 40 if wide else 32)))
        if wide:
            _names_near(canvas, report, place, measure, at)
        else:
            for text, x, y in _numbered(places, values):
                axes.annotate(text, (x, y), xytext=(4, 5), textcoords="offset points", fontsize=9, fontweight="bold")
            if (
                (full := place.full) is not None
                and {BYTES, metric} <= full.row.metrics.keys()
                and full not in measure.front
            ):
                place_of = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center", "fontsize": 9}
                axes.annotate("full", at(full), **place_of)
        return plot(canvas, name, title)


def _with_bytes(tip: Tip, entry: VariantEntry) -> Tip:
    return Tip(f"{tip.text}; {phrases.value(entry.row.metrics[BYTES], BYTES)} bytes", tip.link)


def _names_near(canvas: Canvas, report: Report, place: Place, measure: Measure, at: Any) -> None:
    """Write the names of the front's variants, and of the full cache, near their points."""
    axes, scale, metric = canvas.axes, METRICS[measure.metric].scale, measure.metric
    canvas.whole.get_layout_engine().execute(canvas.whole)
    points = 72 / canvas.whole.dpi

    def pixel(spot: tuple[float, float]) -> tuple[float, float]:
        x, y = axes.transData.transform(spot)
        return round(x * points), round(y * points)

    named = [*measure.front, *([place.full] if place.full is not None and place.full in measure.beaten else [])]
    groups: dict[tuple[float, float], list[VariantEntry]] = {}
    for entry in named:
        groups.setdefault(pixel(at(entry)), []).append(entry)
    texts = ["\n".join(_names(report, place, entries)) for entries in groups.values()]
    sizes = [(6.6 * max(map(len, text.split("\n"))), 14.0 * (1 + text.count("\n"))) for text in texts]
    extent = axes.get_window_extent()
    inside = Box(extent.x0 * points, extent.y0 * points, extent.x1 * points, extent.y1 * points)
    spots = [pixel(at(entry)) for entry in (*measure.front, *measure.beaten)]
    taken = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    front = [pixel(at(entry)) for entry in measure.front]
    for (x, y), (following, higher) in itertools.pairwise(front):  # the line of steps
        taken += [Box(x, y - 2, following, y + 2), Box(following - 2, min(y, higher), following + 2, max(y, higher))]
    for entry in measure.front:  # the intervals
        estimate, x = entry.row.metrics[metric], at(entry)[0]
        if not math.isnan(estimate.low):
            (left, low), (_, high) = (pixel((x, scale * end)) for end in (estimate.low, estimate.high))
            taken.append(Box(left - 2, low, left + 2, high))
    places = beside_points(list(groups), sizes, inside, taken)
    for entries, text, (x, y) in zip(groups.values(), texts, places, strict=True):
        axes.annotate(
            text,
            at(entries[0]),
            xytext=tuple(axes.transData.inverted().transform((x / points, y / points))),
            ha="center",
            va="center",
            fontsize=11,
            linespacing=1.1,
            color=colour(report.style_of(entries[0])),
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        ).set_in_layout(False)


def _names(report: Report, place: Place, entries: Sequence[VariantEntry]) -> list[str]:
    """Return the names of variants at one point, each with its budget, and its condition where not all are there."""
    facets: dict[str, list[str]] = {}
    for entry in entries:
        label = report.budgets.labels[entry.budget] if entry.budget is not None and report.budgets else ""
        name = entry.row.cell.name if entry.budget is None else entry.series
        facets.setdefault(", ".join(filter(None, ("full cache" if entry is place.full else name, label))), []).append(
            entry.facet
        )
    several = len(place.facets) > 1
    names = [
        name if not several or len(of) == len(place.facets) else f"{name} ({', '.join(filter(None, of))})"
        for name, of in facets.items()
    ]
    lines = [line for name in names[:_AT_A_POINT] for line in wrapped(name.replace(" ()", ""), 30)]
    return lines + ([f"and {len(names) - _AT_A_POINT} more"] if len(names) > _AT_A_POINT else [])


def _numbered(places: Sequence[float], values: Sequence[float]) -> Iterator[tuple[str, float, float]]:
    """Yield the numbers of the front's points and where they stand; points that nearly coincide share theirs."""
    near = [0.03 * (max(of) - min(of)) for of in (places, values)]
    first = 0
    for i in range(1, len(places) + 1):
        if i < len(places) and places[i] - places[first] <= near[0] and abs(values[i] - values[first]) <= near[1]:
            continue
        yield (f"{first + 1}" if i == first + 1 else f"{first + 1}–{i}"), places[first], values[first]
        first = i


def errors(estimates: Sequence[Estimate], scale: float) -> list[list[float]]:
    """Return the lengths below and above; none where there is no interval."""
    return [
        [0.0 if math.isnan(e.low) else scale * max(0.0, e.value - e.low) for e in estimates],
        [0.0 if math.isnan(e.high) else scale * max(0.0, e.high - e.value) for e in estimates],
    ]
