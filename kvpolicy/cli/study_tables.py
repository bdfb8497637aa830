"""The tables that `kvpolicy study run` ends with."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.table import Table

from kvpolicy.cli.terminal import width_of
from kvpolicy.study.analysis import Comparison, Estimate, VariantSummary, compare, shown
from kvpolicy.study.metrics import METRICS

if TYPE_CHECKING:
    from rich.console import Console

    from kvpolicy.study.spec import StudySpec


def tables(rows: Sequence[VariantSummary], spec: StudySpec, console: Console) -> Iterator[tuple[Table, list[str]]]:
    """Yield a table per model and dataset, and the names of the metrics for which there is no room.

    A table has intervals and the difference to the study's baseline. A metric is shown with all its digits or not at
    all. A pipe or a file has no edge unless COLUMNS says so: there the console is widened.

    Args:
        rows: of `summarise`.
        spec: says which metrics are shown, and what is compared.
        console: what they are printed on.
    """
    main = next((name for name in spec.metrics if any(name in row.metrics for row in rows)), None)
    differences = {id(c.cell): c for c in compare(rows, main, spec.compare_to)} if main is not None else {}
    bounded = console.is_terminal or "COLUMNS" in os.environ
    for place in dict.fromkeys((row.cell.model, row.cell.dataset) for row in rows):
        here = [row for row in rows if (row.cell.model, row.cell.dataset) == place]
        names = [name for name in spec.metrics if any(name in row.metrics for row in here)]
        left_out: list[str] = []
        table = _table(place, here, names, differences)
        for name in _by_weight(names, main) if bounded else ():
            if width_of(console, table) <= console.width:
                break
            left_out.append(name)
            table = _table(place, here, [each for each in names if each not in left_out], differences)
        if not bounded:
            console.width = max(console.width, width_of(console, table))
        yield table, [name for name in names if name in left_out]


def _by_weight(names: Sequence[str], main: str | None) -> list[str]:
    """Return the metrics that may be left out, first what says least about how good a variant is."""
    return sorted((name for name in reversed(names) if name != main), key=lambda name: METRICS[name].quality)


def _table(
    place: tuple[str, str], here: Sequence[VariantSummary], names: Sequence[str], differences: Mapping[int, Comparison]
) -> Table:
    table = Table(title=f"{place[1]} · {place[0]}", title_justify="left", header_style="bold", box=None)
    # Where not even the least fits, a text goes on in the next line.
    table.add_column("variant", overflow="fold")
    table.add_column("condition", max_width=24, overflow="fold")
    table.add_column("runs", justify="right", overflow="fold")
    for name in names:
        table.add_column(_heading(name), justify="right", overflow="fold")
    compared = [differences[id(row.cell)] for row in here if id(row.cell) in differences]
    if compared:
        title = f"{_heading(compared[0].metric)} − {compared[0].baseline}"
        table.add_column(title, justify="right", min_width=8, overflow="fold")
    for row in here:
        cells = [_cell(row.metrics.get(name), name) for name in names]
        failed = f" ({row.failed} failed)" if row.failed else ""
        runs = f"{row.runs}{failed}" + (f" of {row.runs + row.failed + row.missing}" if row.missing else "")
        change = [_change(differences.get(id(row.cell)))] if compared else []
        table.add_row(row.cell.name, row.cell.condition, runs, *cells, *change)
    return table


def _heading(metric: str) -> str:
    return metric.replace("_", " ") + (" %" if METRICS[metric].percent else "")


def _cell(estimate: Estimate | None, metric: str) -> str:
    """Return an estimate, with its interval where the metric says how good a variant is."""
    if estimate is None:
        return ""
    plain = replace(estimate, low=math.nan, high=math.nan)
    return shown(estimate if METRICS[metric].quality else plain, metric)


def _change(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    return f"{shown(comparison.difference, comparison.metric)}, p (Holm) = {comparison.p_holm:.3g}"
