"""A study as one static folder: the report, a page for every problem, traces, and the data in files for other tools."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvpolicy.errors import KVPolicyError
from kvpolicy.odd_text import harmless
from kvpolicy.outputs import replace_file
from kvpolicy.study.asked import Asked
from kvpolicy.study.extra import library
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.published import SUFFIX, published
from kvpolicy.study.records import Recorded, RunRecord
from kvpolicy.study.report.content import Effect, Place, Report, VariantEntry
from kvpolicy.study.report.page import ProblemLinks, html, palette, templates
from kvpolicy.study.report.publishing import pictures

_GENERATED: Final = "tokens"
"""A metric that every run has in which the model answered."""
_LONGEST: Final = 200_000  # characters of a text that is shown


@dataclass(frozen=True, eq=False)
class TraceWanted:
    """A problem on which a variant and the baseline differ, for a page that shows what each of them kept.

    Attributes:
        place: where.
        number: of the problem.
        effect: the comparison.
    """

    place: Place
    number: int
    effect: Effect

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.effect.entry.number}-{self.effect.base.number}-{self.number}.html"


def traces_wanted(report: Report, most: int) -> list[TraceWanted]:
    """Return the problems whose traces say most: those on which a variant differs from the baseline.

    Comparisons take turns, those with the clearest differences first.

    Args:
        report: the report.
        most: how many at most.
    """
    rounds: list[tuple[int, int, float, TraceWanted]] = []
    for place in report.places:
        for m, measure in enumerate(place.measures):
            for effect in (effect for effects in measure.effects.values() for effect in effects):
                if any(_GENERATED not in entry.row.metrics for entry in (effect.entry, effect.base)):
                    continue  # no text was generated, only read
                for turn, number in enumerate((*effect.worse, *effect.better)):
                    rounds.append((turn, m, effect.comparison.p, TraceWanted(place, number, effect)))
    rounds.sort(key=lambda each: each[:3])
    chosen: dict[str, TraceWanted] = {}
    for *_, wanted in rounds:
        chosen.setdefault(wanted.name, wanted)  # two measures may ask for one page
    return list(chosen.values())[:most]


def write_bundle(
    results: Recorded, asked: Asked, report: Report, folder: Path, traces: Mapping[TraceWanted, str], option: str = ""
) -> list[Path]:
    """Write the folder; return its files, the report first. What lies there under other names stays.

    Args:
        results: what was recorded.
        asked: what the study asks for.
        report: what `build` made of it.
        folder: where to; it is made if it is not there.
        traces: pages that were asked for.
        option: what errors begin with.

    Raises:
        KVPolicyError: the folder cannot be written, or a library is missing.
    """
    for inner in ("problems", "traces", "data", "plots"):
        try:
            (folder / inner).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            begin = f"{option}: {folder / inner}" if option else str(folder / inner)
            raise KVPolicyError(f"{begin} cannot be made ({error.strerror}); name another folder.") from None
    files: dict[str, str | bytes] = {"index.html": html(report, _links(report))}
    files |= _problem_pages(results, asked, report, traces)
    files |= {f"traces/{wanted.name}": page for wanted, page in traces.items()}
    files |= {f"plots/{name}": plot.file() for _, name, plot in pictures(report)}
    files |= _data(results, asked, report)
    for name, content in files.items():
        replace_file(folder / name, content, option)
    return [folder / name for name in files]


def _links(report: Report) -> ProblemLinks:
    places = {id(place): i for i, place in enumerate(report.places)}

    def to(place: Place, number: int, effect: Effect) -> str:
        return f"problems/{places[id(place)]}-{number}.html#{effect.entry.number}-{effect.base.number}"

    return ProblemLinks(
        to, marks=True, sentence="A mark, and its number, lead to the problem: what was asked, and the text under both."
    )


@dataclass(frozen=True)
class _ProblemRun:
    """A run of a problem: the entry that it counts for, its seed if there are several, its record."""

    entry: VariantEntry
    seed: int | None
    record: RunRecord

    @property
    def error(self) -> str | None:
        """Why it failed, harmless."""
        return None if self.record.error is None else _shown(self.record.error)

    @property
    def label(self) -> str:
        """Variant, condition and, where there are several, the seed."""
        cell = self.entry.row.cell
        parts = [cell.name, *([f"({cell.condition})"] if cell.condition else [])]
        return " ".join([*parts, *([f"seed {self.seed}"] if self.seed is not None else [])])


def _problem_pages(
    results: Recorded, asked: Asked, report: Report, traces: Mapping[TraceWanted, str]
) -> dict[str, str]:
    template = templates().get_template("problem.html.j2")
    texts = results.problems()
    found = {record.key: record for record in results.records(asked.keys, outputs=True)}
    pages = {}
    for p, place in enumerate(report.places):
        runs: dict[int, list[_ProblemRun]] = defaultdict(list)
        for entry in ([place.full] if place.full is not None else []) + list(place.entries):
            records = [found[key] for key in entry.row.cell.keys if key in found]
            same = Counter((record.kind, record.problem) for record in records)
            for record in sorted(records, key=lambda r: (r.kind, r.problem, r.seed)):
                several = same[record.kind, record.problem] > 1
                runs[record.problem].append(_ProblemRun(entry, record.seed if several else None, record))
        numbers = sorted(runs)
        for i, number in enumerate(numbers):
            prompt, answer = texts.get(str(runs[number][0].record.document.get("content")), ("", ""))
            pages[f"problems/{p}-{number}.html"] = template.render(
                report=report,
                palette=palette(),
                place=place,
                number=number,
                prompt=_shown(prompt),
                answer=_shown(answer),
                runs=[run for run in runs[number] if run.record.kind == "generate"],
                forced=[run for run in runs[number] if run.record.kind == "force"],
                outputs=_outputs(runs[number]),
                metrics=[name for name in place.metrics if name != "seconds"],
                described=METRICS,
                shown=_value,
                before=f"{p}-{numbers[i - 1]}.html" if i else "",
                after=f"{p}-{numbers[i + 1]}.html" if i + 1 < len(numbers) else "",
                traces=[wanted for wanted in traces if wanted.place is place and wanted.number == number],
            )
    return pages


def _outputs(runs: Sequence[_ProblemRun]) -> list[tuple[str, list[int]]]:
    """Return each text that was generated, and the places in the list of runs that gave it."""
    found: dict[str, list[int]] = {}
    for i, run in enumerate(run for run in runs if run.record.kind == "generate"):
        if run.record.error is None and run.record.packed:
            found.setdefault(_shown(run.record.output), []).append(i)
    return list(found.items())


def _shown(text: str) -> str:
    lines = "\n".join(map(harmless, text.split("\n")))
    return lines if len(lines) <= _LONGEST else f"{lines[:_LONGEST]}…"


def _value(record: RunRecord, metric: str) -> str:
    if metric not in record.metrics:
        return "–"
    kind, value = METRICS[metric], record.metrics[metric]
    if kind.binary and value in (0, 1):
        return "right" if value else "wrong"
    return f"{kind.scale * value:,.{kind.digits}f}{' %' if kind.percent else ''}"


def _data(results: Recorded, asked: Asked, report: Report) -> dict[str, bytes | str]:
    """Return the numbers: every run and every mean as CSV, every run as Parquet too, and what is published."""
    runs = _run_columns(results, report)
    arrow, parquet = (library(name, "the data of a bundle need") for name in ("pyarrow", "pyarrow.parquet"))
    stream = io.BytesIO()
    parquet.write_table(arrow.table(runs), stream, compression="zstd")
    summary: list[dict[str, Any]] = []
    for entry in report.entries:
        cell = entry.row.cell
        where = {"model": cell.model, "dataset": cell.dataset, "variant": cell.name, "condition": cell.condition}
        summary += [
            {
                **where,
                "metric": name,
                "mean": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "problems": estimate.problems,
            }
            for name, estimate in entry.row.metrics.items()
        ]
    return {
        "data/runs.csv": _csv(list(runs), zip(*runs.values(), strict=True)),
        "data/runs.parquet": stream.getvalue(),
        "data/means.csv": _csv(list(summary[0]) if summary else [], (row.values() for row in summary)),
        f"data/{report.study}{SUFFIX}": published(results, asked, report.commands.run),
    }


def _run_columns(results: Recorded, report: Report) -> dict[str, list[Any]]:
    found = {record.key: record for record in results.records(outputs=False)}
    rows = [(entry.row.cell, found[key]) for entry in report.entries for key in entry.row.cell.keys if key in found]
    columns: dict[str, list[Any]] = {
        "model": [cell.model for cell, _ in rows],
        "dataset": [cell.dataset for cell, _ in rows],
        "variant": [cell.name for cell, _ in rows],
        "condition": [cell.condition for cell, _ in rows],
        "policy": [cell.digest for cell, _ in rows],
    }
    for field in ("kind", "problem", "seed", "prompt_tokens", "error"):
        columns[field] = [getattr(record, field) for _, record in rows]
    for metric in METRICS:
        if any(metric in record.metrics for _, record in rows):
            columns[metric] = [record.metrics.get(metric) for _, record in rows]
    return columns


def _csv(head: Sequence[str], rows: Any) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return stream.getvalue()
