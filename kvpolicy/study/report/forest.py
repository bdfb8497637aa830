"""The forest plots of a report: differences to the baseline, each on a line of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kvpolicy.study.analysis import shown
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.report.content import Effect, Report
from kvpolicy.study.report.drawing import GRID, MUTED, PAPER, Plot, Tip, colour, figure, plot
from kvpolicy.study.report.labels import wrapped
from kvpolicy.study.report.plots import errors

_LABEL_WIDTH: Final = 28  # characters


def forest_plot(report: Report, effects: Sequence[Effect], name: str, where: str) -> Plot:
    """Return a forest plot: one line for each difference, below the name of what was swapped.

    Args:
        report: says how variants are drawn.
        effects: of one metric in one condition, grouped; at least one.
        name: begins the plot's ids.
        where: dataset and condition, for the title.
    """
    metric, baseline = effects[0].comparison.metric, effects[0].comparison.baseline
    title = f"{METRICS[metric].title}: difference to {baseline}, with its interval, on {where}"
    scale = METRICS[metric].scale
    lines: list[tuple[str, Effect | None]] = []
    for effect in effects:
        if effect.swapped not in [text for text, head in lines if head is None]:
            lines.append((effect.swapped, None))
        lines.append((effect.value, effect))
    labels = ["" if effect is None else "\n".join(wrapped(text, _LABEL_WIDTH)) for text, effect in lines]
    room = 0.27 if any("\n" in label for label in labels) else 0.2
    with figure(0.75 + room * len(lines)) as canvas:
        axes = canvas.axes
        for height, effect in ((i, effect) for i, (_, effect) in enumerate(lines) if effect is not None):
            difference, style = effect.comparison.difference, report.style_of(effect.entry)
            value = scale * difference.value
            axes.errorbar(value, height, xerr=errors([difference], scale), color=colour(style), linewidth=1.6)
            look = {
                "marker": style.marker,
                "markersize": 6.5,
                "color": colour(style),
                "markerfacecolor": colour(style) if effect.verdict else PAPER,
            }
            canvas.point(value, height, look, _difference_tip(report, effect))
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(lines)), labels, fontsize=9.5 if room == 0.2 else 8, linespacing=1)
        for height, (text, _) in ((i, line) for i, line in enumerate(lines) if line[1] is None):
            place = {"xycoords": ("figure fraction", "data"), "va": "center", "fontsize": 9.5, "fontweight": "bold"}
            # Heads may reach into the plot, where nothing else stands on their line.
            axes.annotate(text, (0.01, height), annotation_clip=False, **place).set_in_layout(False)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x", color=GRID)
        axes.spines["left"].set_visible(False)
        _symmetric(axes)
        unit = ", points" if METRICS[metric].percent else ""
        axes.set_xlabel(
            f"← better · worse →{unit}" if METRICS[metric].better == "less" else f"← worse · better →{unit}"
        )
        return plot(canvas, name, title)


def _difference_tip(report: Report, effect: Effect) -> Tip:
    comparison = effect.comparison
    metric, unit = comparison.metric, " points" if METRICS[comparison.metric].percent else ""
    text = f"{comparison.cell.name} against {comparison.baseline}: {shown(comparison.difference, metric)}{unit}"
    counts = f"{len(effect.better)} better, {len(effect.worse)} worse, {len(effect.same)} equal"
    return Tip(f"{text}; {counts}", report.link(effect.entry, metric))


def _symmetric(axes: Any) -> None:
    """Keep zero well inside, whatever side the differences are on."""
    low, high = axes.get_xlim()
    reach = max(abs(low), abs(high))
    axes.set_xlim(min(low, -0.25 * reach), max(high, 0.25 * reach))
