"""The tables that `kvpolicy study run` ends with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from kvpolicy.study.analysis import Comparison, Estimate, Row, compare, shown
from kvpolicy.study.metrics import METRICS

if TYPE_CHECKING:
    from kvpolicy.study.spec import StudySpec


def tables(rows: Sequence[Row], spec: StudySpec) -> Iterator[Table]:
    """Yield a table per model and dataset, with intervals and the difference to the study's baseline.

    Args:
        rows: of `summarise`.
        spec: says which metrics are shown, and what is compared.
    """
    main = next((name for name in spec.metrics if any(name in row.metrics for row in rows)), None)
    differences = {id(c.cell): c for c in compare(rows, main, spec.compare_to)} if main is not None else {}
    for place in dict.fromkeys((row.cell.model, row.cell.dataset) for row in rows):
        here = [row for row in rows if (row.cell.model, row.cell.dataset) == place]
        names = [name for name in spec.metrics if any(name in row.metrics for row in here)]
        table = Table(title=escape(f"{place[1]} · {place[0]}"), title_justify="left", header_style="bold", box=None)
        # Where it is too narrow a number goes on in the next line: cut short it would be another number.
        table.add_column("variant", overflow="fold")
        table.add_column("condition", max_width=24, overflow="fold")
        table.add_column("runs", justify="right", overflow="fold")
        for name in names:
            table.add_column(name.replace("_", " "), justify="right", overflow="fold")
        compared = [differences[id(row.cell)] for row in here if id(row.cell) in differences]
        if compared:
            title = f"{compared[0].metric.replace('_', ' ')} − {escape(compared[0].baseline)}"
            table.add_column(title, justify="right", min_width=8, overflow="fold")
        for row in here:
            cells = [_cell(row.metrics.get(name), name) for name in names]
            failed = f" ({row.failed} failed)" if row.failed else ""
            change = [_change(differences.get(id(row.cell)))] if compared else []
            table.add_row(escape(row.cell.name), escape(row.cell.condition), f"{row.runs}{failed}", *cells, *change)
        yield table


def _cell(estimate: Estimate | None, metric: str) -> str:
    """Return an estimate, with its interval where the metric says how good a variant is."""
    if estimate is None:
        return ""
    plain = replace(estimate, low=math.nan, high=math.nan)
    return shown(estimate if METRICS[metric].quality else plain, metric)


def _change(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    return f"{shown(comparison.difference, comparison.metric)}, p = {comparison.p_holm:.3g}"
