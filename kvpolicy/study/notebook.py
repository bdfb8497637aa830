"""A study in a notebook or a script: run here, with a bar, and shown as a table or a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpolicy.errors import KVPolicyError
from kvpolicy.html_text import grid
from kvpolicy.pictures import new_figure
from kvpolicy.study.analysis import VariantSummary, cuts, failures, shown, summarise
from kvpolicy.study.asked import Asked
from kvpolicy.study.executors import Executor, Inline, Processes
from kvpolicy.study.extra import library
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.models import find_model
from kvpolicy.study.results import Results
from kvpolicy.study.runner import Runner
from kvpolicy.study.runs import Plan
from kvpolicy.study.spec import StudySpec, find_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvpolicy.study.runs import Run
    from kvpolicy.study.work import Outcome

_SPECIAL = {
    **{each: f"\\{each}" for each in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


class NotebookBar:
    """Progress as tqdm shows it: a widget where ipywidgets are installed, a line of text elsewhere.

    Args:
        hidden: show nothing.
    """

    def __init__(self, *, hidden: bool = False) -> None:
        self._hidden = hidden
        self._bar: Any = None

    def begin(self, stage: str, runs: int, tokens: int) -> None:
        """Start a bar of so many runs."""
        self.close()
        if runs and not self._hidden:
            self._bar = library("tqdm.auto", "a bar needs").tqdm(total=runs, desc=stage, unit="run")

    def advance(self, runs: Sequence[Run], outcomes: Sequence[Outcome], tokens: int) -> None:
        """Move the bar on."""
        if self._bar is not None:
            self._bar.update(len(runs))

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


@dataclass(frozen=True)
class StudyTable:
    """What a study has measured: a row per variant, condition, model and dataset, and metrics with their intervals.

    Attributes:
        study: its name.
        path: its results file.
        rows: as the study asks for them.
        metrics: which are shown.
    """

    study: str
    path: Path
    rows: tuple[VariantSummary, ...] = field(repr=False)
    metrics: tuple[str, ...]

    @staticmethod
    def read(path: str | Path) -> StudyTable:
        """Read a results file; raises ResultsError when it is none."""
        with Results(path) as results:
            asked = Asked.last(results)
            rows = tuple(summarise(results, cells=asked.cells, study=asked.study))
            name = results.meta("study") or "study"
        wanted = asked.study.get("metrics") or METRICS
        found = {metric for row in rows for metric in row.metrics}
        return StudyTable(name, Path(path), rows, tuple(each for each in METRICS if each in found and each in wanted))

    def __str__(self) -> str:
        lines = [list(self._head()), *map(self._line, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        told = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([f"Study: {self.study}", *told, *self._notes()])

    def records(self) -> list[dict[str, str | int | float]]:
        """Return a flat record of each row, as `pandas.DataFrame` takes them.

        Each metric `m` that a row has gives `m`, `m_low` and `m_high`: the mean over problems and its interval at 95 %,
        shares as fractions; the interval is NaN with fewer than two problems.
        """
        found: list[dict[str, str | int | float]] = []
        for row in self.rows:
            cell = row.cell
            record: dict[str, str | int | float] = {
                "variant": cell.name, "condition": cell.condition, "model": cell.model, "dataset": cell.dataset,
                "runs": row.runs, "failed": row.failed,
            }  # fmt: skip
            for name in self.metrics:
                if name in row.metrics:
                    each = row.metrics[name]
                    record |= {name: each.value, f"{name}_low": each.low, f"{name}_high": each.high}
            found.append(record)
        return found

    def latex(self, metric: str | None = None) -> str:
        """Return a table for a paper, ruled by booktabs: a row per variant, a column per condition, model and dataset.

        Args:
            metric: what the cells show, with intervals at 95 %; the first one that says how good a variant is, if None.

        Raises:
            KVPolicyError: nothing has measured that metric.
        """
        metric, drawn = self._of(metric, "latex")
        models = len({row.cell.model for row in drawn}) > 1
        # What has no condition, such as the full cache beside budgets, holds in all of them.
        conditions = [c for c in dict.fromkeys(row.cell.condition for row in drawn) if c] or [""]
        places = dict.fromkeys((row.cell.model, row.cell.dataset) for row in drawn)
        cells = {(r.cell.name, r.cell.condition, r.cell.model, r.cell.dataset): r.metrics[metric] for r in drawn}
        columns = [(condition, *place) for place in places for condition in conditions]
        heads = [", ".join(filter(None, (c, m if models else "", d if len(places) > 1 else ""))) for c, m, d in columns]
        lines = [["variant", *heads]]
        for name in dict.fromkeys(row.cell.name for row in drawn):
            here = [cells.get((name, *column), cells.get((name, "", *column[1:]))) for column in columns]
            lines.append([name, *("--" if each is None else shown(each, metric) for each in here)])
        head, *body = (" & ".join(map(_escaped, line)) + r" \\" for line in lines)
        rules = [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        return "\n".join([f"% {METRICS[metric].title}; study {self.study}", *rules, r"\end{tabular}"]) + "\n"

    def _notes(self) -> list[str]:
        """Say what was cut, and what failed."""
        return [*cuts(self.rows), *(f"{count} failed: {reason}" for reason, count in failures(self.rows).items())]

    def _head(self) -> tuple[str, ...]:
        return ("variant", "condition", "model", "dataset", "runs", *self.metrics)

    def _repr_html_(self) -> str:
        head = self._head()
        lines = [self._line(row) for row in self.rows]
        lines += [[note] for note in self._notes()]
        return grid(f"Study: {self.study}", head, lines)

    def _line(self, row: VariantSummary) -> list[str]:
        cell = row.cell
        failed = f" ({row.failed} failed)" if row.failed else ""
        told = [shown(row.metrics[name], name) if name in row.metrics else "" for name in self.metrics]
        return [cell.name, cell.condition, cell.model, cell.dataset, f"{row.runs}{failed}", *told]

    def plot(self, metric: str | None = None) -> Figure:
        """Draw a metric of every row with its interval, 95 % over problems; returns a matplotlib figure.

        Args:
            metric: the first one that says how good a variant is, if None.

        Raises:
            KVPolicyError: nothing has measured that metric, or matplotlib is not installed.
        """
        metric, drawn = self._of(metric, "plot")
        figure = new_figure(7, 1.2 + 0.28 * len(drawn))
        axes: Any = figure.add_subplot()
        values = [row.metrics[metric] for row in drawn]
        errors = [[each.value - each.low for each in values], [each.high - each.value for each in values]]
        axes.errorbar([each.value for each in values], range(len(drawn)), xerr=errors, fmt="o", capsize=3)
        names = [" · ".join(filter(None, (row.cell.name, row.cell.condition, row.cell.dataset))) for row in drawn]
        axes.set_yticks(range(len(drawn)), names, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel(METRICS[metric].title)
        axes.grid(axis="x", alpha=0.3)
        return figure

    def _of(self, metric: str | None, who: str) -> tuple[str, list[VariantSummary]]:
        """Return a metric, the first of quality if None, and the rows that have it."""
        best = [name for name in self.metrics if METRICS[name].quality] or list(self.metrics)
        metric = metric if metric is not None else next(iter(best), "")
        found = [row for row in self.rows if metric in row.metrics]
        if not found:
            known = ", ".join(self.metrics) or "nothing"
            raise KVPolicyError(f"{who}: {metric[:60]!r} has not been measured; this study measured {known}.")
        return metric, found


def _escaped(text: str) -> str:
    """Return a text as LaTeX shows it."""
    return "".join(_SPECIAL.get(each, each) for each in text)


def run_study(
    study: StudySpec | str | Path, out: str | Path, *, device: str = "auto", workers: int = 0, progress: bool = True
) -> StudyTable:
    """Run what a study still lacks, and return its table; what is in the file already is not run again.

    Args:
        study: a specification, a registered name, or the path of a study file.
        out: the results file, made if it is not there.
        device: as torch names it, or "auto".
        workers: processes; 0 runs in this one, which a notebook can interrupt.
        progress: show a bar.

    Raises:
        KVPolicyError: the study is wrong, its models or data are not here, or its file cannot be written.
    """
    spec = study if isinstance(study, StudySpec) else find_study(str(study))
    plan = Plan(spec, [find_model(name, spec.dtype, device) for name in spec.models])
    executor: Executor = Processes(workers) if workers else Inline()
    bar = NotebookBar(hidden=not progress)
    with Results(out, spec.study) as results, executor:
        try:
            Runner(plan, results, executor, bar).run()
        finally:
            bar.close()
    return StudyTable.read(out)
