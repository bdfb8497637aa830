"""Write the tables of docs/results/README.md from the published numbers: `python -P scripts/results_tables.py`.

A table stands between `<!-- table: STUDY METRIC[,METRIC] DATASET ... -->` and `<!-- end -->`: a row for each variant of
`docs/results/STUDY.json.gz`, a column for each dataset and condition, in it the first of the metrics that was measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvpolicy.study.analysis import VariantSummary, summarise
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.published import SUFFIX, Published

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "results"
PAGE = FOLDER / "README.md"
TABLE = re.compile(r"(<!-- table: (\S+) (\S+) (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
SHORT = (
    (r"budget=([\d.]+)% of the trace", r"\1 %"),
    (r"(, )?protect\.prompt=true", r"\1pinned"),
    (r"(, )?protect\.prompt=false", ""),
    (r"budget=(\d+)", r"\1"),
    (r"compress=", ""),
    (r"policy=", ""),
)
"""What conditions are called in the heads of columns."""


def shown(row: VariantSummary, metrics: Sequence[str]) -> str:
    """Return a mean with its interval: percent for shares of right answers, four digits for others."""
    metric = next((metric for metric in metrics if row.metrics.get(metric) is not None), None)
    if metric is None:
        return "–"
    found = row.metrics[metric]
    if METRICS[metric].percent:
        return f"{100 * found.value:.0f} [{100 * found.low:.0f}, {100 * found.high:.0f}]"
    return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"


def heading(dataset: str, condition: str, *, several: bool) -> str:
    """Return what a column is called."""
    for long, short in SHORT:
        condition = re.sub(long, short, condition)
    parts = [dataset.replace("-medium", "").replace("-", " ")] if several or not condition else []
    return ", ".join([*parts, condition] if condition else parts)


def lines(rows: Sequence[VariantSummary], metrics: Sequence[str], datasets: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a table; the full cache stands first, where all columns of a dataset share it."""
    measured = [row for row in rows if row.cell.dataset in datasets]
    conditions = list(dict.fromkeys(row.cell.condition for row in measured if row.cell.condition)) or [""]
    conditions.sort(key=lambda condition: "protect.prompt=true" in condition)
    columns = [(dataset, condition) for dataset in datasets for condition in conditions]
    by_cell = {(row.cell.name, row.cell.dataset, row.cell.condition): shown(row, metrics) for row in measured}
    heads = [heading(*column, several=len(datasets) > 1) for column in columns]
    yield f"| variant | {' | '.join(heads)} |"
    yield "|---|" + "---|" * len(columns)
    for name in dict.fromkeys(row.cell.name for row in measured):
        cells = [by_cell.get((name, d, c)) or by_cell.get((name, d, "")) or "–" for d, c in columns]
        if any(cell != "–" for cell in cells):
            yield f"| `{name}` | {' | '.join(cells)} |"


def written(text: str) -> str:
    """Return the page with its tables as the published numbers have them."""
    read: dict[tuple[str, str], list[VariantSummary]] = {}

    def table(match: re.Match[str]) -> str:
        first, study, metric, datasets, _, last = match.groups()
        if (study, metric) not in read:
            read[study, metric] = summarise(Published(FOLDER / f"{study}{SUFFIX}"), metric.split(","))
        rows = "\n".join(lines(read[study, metric], metric.split(","), datasets.split()))
        return f"{first}{rows}\n{last}"

    return TABLE.sub(table, text)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
