"""The plots of a report."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Final

from kvpolicy.study.analysis import Estimate
from kvpolicy.study.extra import library
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.report.budgets import BudgetAxis
from kvpolicy.study.report.content import BYTES, Effect, Measure, Place, Report, VariantEntry
from kvpolicy.study.report.drawing import BAD, BAND, GOOD, GRID, INK, MUTED, PAPER, SERIES, Plot, figure, plot

_MARKERS: Final = ("s", "^", "D", "v", "P")
_DASHES: Final = ((0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (2.5, 1)), (0, (8, 2)))
_LEGEND_WIDTH, _LABEL_WIDTH = 52, 28  # characters
_LOGARITHMIC: Final = 8  # an axis whose ends are this far apart has equal steps for equal factors
_UNITS: Final = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def budget_plots(report: Report, place: Place, measure: Measure, name: str) -> Iterator[list[Plot]]:
    """Yield the plots of a metric against the budget, facet by facet: at most five variants at a time and the baseline.

    Args:
        report: with budgets.
        place: a dataset with a model.
        measure: one of its measures.
        name: begins the plots' ids.
    """
    assert report.budgets is not None
    limits = _limits(place, measure.metric)
    others = [series for series in report.series if series != report.baseline_series]
    groups = [others[i : i + len(SERIES)] for i in range(0, len(others), len(SERIES))] or [[]]
    for i, (facet, lines) in enumerate(place.facets.items()):
        drawn = {
            series: [entry for entry in points if measure.metric in entry.row.metrics]
            for series, points in lines.items()
        }
        drawn = {series: points for series, points in drawn.items() if points}
        made = []
        for j, group in enumerate(groups):
            here = [series for series in group if series in drawn]
            if not here and not (j == 0 and report.baseline_series in drawn):
                continue
            part = f"variants {j + 1} of {len(groups)}" if len(groups) > 1 else ""
            caption = " · ".join(filter(None, (facet, part)))
            title = f"{METRICS[measure.metric].title} against the budget on {place.dataset}"
            title += f" ({caption})" if caption else ""
            rows = sum(len(_wrapped(series)) for series in (*here, "full", report.baseline_series))
            with figure(2.6 + 0.17 * rows) as (whole, axes):
                _budgets(axes, report, place, measure.metric, drawn, here)
                axes.set_ylim(*limits)
                whole.legend(loc="outside lower left", ncols=1, handlelength=3.2, labelspacing=0.35)
                made.append(plot(whole, f"{name}-{i}-{j}", title, caption))
        if made:
            yield made


def _budgets(
    axes: Any, report: Report, place: Place, metric: str, drawn: dict[str, list[VariantEntry]], chosen: Sequence[str]
) -> None:
    assert report.budgets is not None
    positions = _positions(report.budgets)
    for series, points in drawn.items():
        if series not in chosen and series != report.baseline_series:
            places = [positions[entry.budget or 0] for entry in points]
            axes.plot(places, [entry.row.metrics[metric].value for entry in points], color=GRID, linewidth=0.9)
    if place.full is not None and metric in place.full.row.metrics:
        whole = place.full.row.metrics[metric]
        if not math.isnan(whole.low) and whole.high > whole.low:
            axes.axhspan(whole.low, whole.high, color=BAND, linewidth=0, zorder=0.5)
        axes.axhline(whole.value, color=MUTED, linewidth=1.1, zorder=0.6, label="full cache and its interval")
    steps = [b - a for a, b in itertools.pairwise(positions)]
    aside = 0.035 * min(steps)
    shown = [series for series in (report.baseline_series, *chosen) if series in drawn]
    for i, series in enumerate(shown):
        style: dict[str, Any] = {"color": INK, "marker": "o", "linestyle": "-", "linewidth": 1.8, "zorder": 3}
        if series in chosen:
            at = chosen.index(series)
            style = {"color": SERIES[at], "marker": _MARKERS[at], "linestyle": _DASHES[at], "linewidth": 1.5}
        estimates = [entry.row.metrics[metric] for entry in drawn[series]]
        places = [positions[entry.budget or 0] + (i - (len(shown) - 1) / 2) * aside for entry in drawn[series]]
        label = "\n".join(_wrapped(series if series in chosen else f"{series} (baseline)"))
        axes.errorbar(
            places,
            [estimate.value for estimate in estimates],
            yerr=_errors(estimates),
            label=label,
            markersize=5,
            elinewidth=0.9,
            **style,
        )
    axes.set_xticks(positions, report.budgets.labels)
    axes.margins(x=0.06)
    axes.set_xlabel(report.budgets.title)
    axes.set_ylabel("\n".join(textwrap.wrap(METRICS[metric].title, 32)))


def _positions(budgets: BudgetAxis) -> list[float]:
    places = list(budgets.positions)
    if min(places) > 0 and max(places) / min(places) >= _LOGARITHMIC:
        return [math.log2(place) for place in places]
    return places


def _limits(place: Place, metric: str) -> tuple[float, float]:
    """Return the same limits for all plots of a metric, so that they can be compared."""
    entries = [*place.entries, *([place.full] if place.full is not None else [])]
    ends = [
        end
        for entry in entries
        if (found := entry.row.metrics.get(metric)) is not None
        for end in (found.value, found.low, found.high)
        if not math.isnan(end)
    ]
    room = 0.05 * (max(ends) - min(ends)) or 0.05 * abs(ends[0]) or 0.5
    return min(ends) - room, max(ends) + room


def front_plot(place: Place, measure: Measure, name: str) -> Plot:
    """Return the plot of a metric against bytes, with the front as a line of steps.

    Args:
        place: a dataset with a model.
        measure: one of its measures, with a front.
        name: begins the plot's ids.
    """
    metric = measure.metric
    title = f"{METRICS[metric].title} against bytes of keys and values on {place.dataset}; numbers as in the table"
    sizes = [entry.row.metrics[BYTES].value for entry in (*measure.front, *measure.beaten)]
    unit, word = next(((unit, word) for unit, word in _UNITS if max(sizes) >= unit), (1, "bytes"))
    with figure(3.2) as (made, axes):
        for entry in measure.beaten:
            full = entry is place.full
            axes.plot(
                entry.row.metrics[BYTES].value / unit,
                entry.row.metrics[metric].value,
                linestyle="",
                marker="D" if full else "o",
                markersize=6 if full else 4,
                markerfacecolor=INK if full else PAPER,
                markeredgecolor=INK if full else MUTED,
                markeredgewidth=0.9,
            )
        places = [entry.row.metrics[BYTES].value / unit for entry in measure.front]
        values = [entry.row.metrics[metric].value for entry in measure.front]
        errors = _errors([entry.row.metrics[metric] for entry in measure.front])
        axes.step(places, values, where="post", color=SERIES[0], linewidth=1.6)
        axes.errorbar(
            places, values, yerr=errors, linestyle="", marker="o", markersize=6, color=SERIES[0], elinewidth=0.9
        )
        for text, x, y in _numbered(places, values):
            axes.annotate(text, (x, y), xytext=(4, 5), textcoords="offset points", fontsize=9, fontweight="bold")
        if place.full is not None and BYTES in place.full.row.metrics and metric in place.full.row.metrics:
            x, y = (place.full.row.metrics[each].value for each in (BYTES, metric))
            axes.annotate("full", (x / unit, y), xytext=(0, -14), textcoords="offset points", ha="center", fontsize=9)
        if min(sizes) > 0 and max(sizes) / min(sizes) >= _LOGARITHMIC:
            ticker = library("matplotlib.ticker", "the plots of a report need")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.margins(x=0.08, y=0.1)
        axes.set_xlabel(f"keys and values of a row, at most, {word}")
        axes.set_ylabel("\n".join(textwrap.wrap(METRICS[metric].title, 32)))
        return plot(made, name, title)


def _numbered(places: Sequence[float], values: Sequence[float]) -> Iterator[tuple[str, float, float]]:
    """Yield the numbers of the front's points and where they stand; points that nearly coincide share theirs."""
    near = [0.03 * (max(of) - min(of)) for of in (places, values)]
    first = 0
    for i in range(1, len(places) + 1):
        if i < len(places) and places[i] - places[first] <= near[0] and abs(values[i] - values[first]) <= near[1]:
            continue
        yield (f"{first + 1}" if i == first + 1 else f"{first + 1}–{i}"), places[first], values[first]
        first = i


def forest_plot(effects: Sequence[Effect], name: str, where: str) -> Plot:
    """Return a forest plot: one line for each difference, below the name of what was swapped.

    Args:
        effects: of one metric in one condition, grouped; at least one.
        name: begins the plot's ids.
        where: dataset and condition, for the title.
    """
    metric, baseline = effects[0].comparison.metric, effects[0].comparison.baseline
    title = f"{METRICS[metric].title}: difference to {baseline}, with its interval, on {where}"
    lines: list[tuple[str, Effect | None]] = []
    for effect in effects:
        if effect.swapped not in [text for text, head in lines if head is None]:
            lines.append((effect.swapped, None))
        lines.append((effect.value, effect))
    labels = ["" if effect is None else "\n".join(_wrapped(text, _LABEL_WIDTH)) for text, effect in lines]
    room = 0.27 if any("\n" in label for label in labels) else 0.2
    with figure(0.75 + room * len(lines)) as (made, axes):
        for height, effect in ((i, effect) for i, (_, effect) in enumerate(lines) if effect is not None):
            difference = effect.comparison.difference
            colour = {"better": GOOD, "worse": BAD}.get(effect.verdict, INK)
            axes.errorbar(
                difference.value,
                height,
                xerr=_errors([difference]),
                marker="o" if effect.verdict else "s",
                markersize=6 if effect.verdict else 4.5,
                markerfacecolor=colour if effect.verdict else PAPER,
                color=colour,
                linewidth=1.6,
            )
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(lines)), labels, fontsize=9.5 if room == 0.2 else 8, linespacing=1)
        for height, (text, _) in ((i, line) for i, line in enumerate(lines) if line[1] is None):
            place = {"xycoords": ("figure fraction", "data"), "va": "center", "fontsize": 9.5, "fontweight": "bold"}
            # Heads may reach into the plot, where nothing else stands on their line.
            axes.annotate(text, (0.01, height), annotation_clip=False, **place).set_in_layout(False)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.spines["left"].set_visible(False)
        _symmetric(axes)
        axes.set_xlabel("← better · worse →" if METRICS[metric].better == "less" else "← worse · better →")
        return plot(made, name, title)


def _symmetric(axes: Any) -> None:
    """Keep zero well inside, whatever side the differences are on."""
    low, high = axes.get_xlim()
    reach = max(abs(low), abs(high))
    axes.set_xlim(min(low, -0.25 * reach), max(high, 0.25 * reach))


def _errors(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Return the lengths below and above; none where there is no interval."""
    return [
        [0.0 if math.isnan(e.low) else max(0.0, e.value - e.low) for e in estimates],
        [0.0 if math.isnan(e.high) else max(0.0, e.high - e.value) for e in estimates],
    ]


def _wrapped(name: str, width: int = _LEGEND_WIDTH) -> list[str]:
    # A name may be broken after "=" too.
    lines = textwrap.wrap(name.replace("=", "= "), width, max_lines=2, placeholder=" …")
    return [line.replace("= ", "=") for line in lines] or [name]
