"""What a report says, as plain data: pages and tables only lay it out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from kvpolicy.study.analysis import Comparison, VariantSummary, compare, cuts, failures, refusals, summarise
from kvpolicy.study.asked import Asked
from kvpolicy.study.design import POLICY
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.records import Recorded
from kvpolicy.study.report.budgets import BudgetAxis, budget_axis, budget_of, without_budget
from kvpolicy.study.report.settings import StudySettings, settings
from kvpolicy.study.report.styles import FULL_CACHE, Style, styles
from kvpolicy.study.runs import REFERENCE

BYTES: Final = "bytes_peak"
SIGNIFICANT: Final = 0.05
"""Largest corrected p value at which a difference is called better or worse."""

_TEXTS: Final = ("policy", "description", "paper", "departures", "schema_version")
_MOST_PARTS: Final = 3  # two policies that differ in more parts are two methods, not one with a part swapped


@dataclass(frozen=True)
class Commands:
    """The commands that make a report again: one that runs the study, one that writes the report."""

    run: str
    report: str


@dataclass(frozen=True)
class VariantEntry:
    """A variant in one condition, on one dataset with one model.

    Attributes:
        row: its numbers.
        series: the variant without its budget: entries of one series make a line.
        facet: the condition without its budget.
        budget: index of its budget on the study's axis; None if it is not on it.
        number: names it within the report.
    """

    row: VariantSummary
    series: str
    facet: str
    budget: int | None
    number: int = 0


@dataclass(frozen=True)
class Effect:
    """What a variant changes against the baseline, in one condition.

    Attributes:
        entry: the variant.
        base: the baseline there.
        comparison: the difference, with its intervals and p values.
        swapped: what differs from the baseline: a component, a parameter, or several.
        value: what the variant has there; its name if that says more.
        better, worse, same: numbers of the problems on which the variant is better, worse, equal.
        verdict: ``better`` or ``worse`` if the corrected p value is below `SIGNIFICANT`, else empty.
    """

    entry: VariantEntry
    base: VariantEntry
    comparison: Comparison
    swapped: str
    value: str
    better: tuple[int, ...]
    worse: tuple[int, ...]
    same: tuple[int, ...]
    verdict: str


@dataclass(frozen=True)
class Measure:
    """A metric of quality on one dataset with one model.

    Attributes:
        metric: its name.
        front: entries that no other one beats in both this metric and bytes, the smallest first.
        beaten: the other entries that have both numbers.
        effects: differences to the baseline by condition, grouped by what was swapped.
    """

    metric: str
    front: tuple[VariantEntry, ...]
    beaten: tuple[VariantEntry, ...]
    effects: Mapping[str, tuple[Effect, ...]]


@dataclass(frozen=True)
class Place:
    """A dataset with a model.

    Attributes:
        model, dataset: which.
        full: the full cache.
        entries: all variants in all conditions, in the order of the study.
        metrics: metrics of the table, as far as there are numbers.
        measures: the metrics of quality among them.
    """

    model: str
    dataset: str
    full: VariantEntry | None
    entries: tuple[VariantEntry, ...]
    metrics: tuple[str, ...]
    measures: tuple[Measure, ...]

    @cached_property
    def facets(self) -> dict[str, dict[str, tuple[VariantEntry, ...]]]:
        """Facet -> series -> its entries on the budget axis, the smallest budget first."""
        found: dict[str, dict[str, list[VariantEntry]]] = {}
        for entry in self.entries:
            if entry.budget is not None:
                found.setdefault(entry.facet, {}).setdefault(entry.series, []).append(entry)
        return {
            facet: {name: tuple(sorted(points, key=lambda e: e.budget or 0)) for name, points in lines.items()}
            for facet, lines in found.items()
        }

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of a dataset that has several, as far as there are numbers."""
        if not self.measures:
            return ()
        entries = [*self.entries, *([] if self.full is None else [self.full])]
        found = {task for entry in entries for task in entry.row.by_task(self.measures[0].metric)}
        return tuple(sorted(found)) if len(found) > 1 else ()

    @cached_property
    def conditions(self) -> dict[str, tuple[VariantEntry, ...]]:
        """Condition -> its entries, in the order of the study."""
        found: dict[str, list[VariantEntry]] = {}
        for entry in self.entries:
            found.setdefault(entry.row.cell.condition, []).append(entry)
        return {condition: tuple(entries) for condition, entries in found.items()}


@dataclass(frozen=True)
class Report:
    """A study's results.

    Attributes:
        study: its name.
        description: what it asks; may be empty.
        commands: how the report is made again.
        baseline: the variant that the others are compared with.
        baseline_series: the series that it belongs to.
        budgets: the study's budgets, if it compares several.
        places: every dataset with every model.
        runs, failed: how many runs of these variants are recorded, and how many of them failed.
        asked: how many runs the study asks for.
        older: what else the file holds, as a sentence; empty if nothing.
        failures: reason -> number of runs.
        refusals: a sentence for each variant that is not graded.
        cuts: a sentence for each dataset on which the full cache's answers were cut.
        settings: all that the numbers depend on.
    """

    study: str
    description: str
    commands: Commands
    baseline: str
    baseline_series: str
    budgets: BudgetAxis | None
    places: tuple[Place, ...]
    runs: int
    failed: int
    asked: int
    older: str
    failures: Mapping[str, int]
    refusals: tuple[str, ...]
    cuts: tuple[str, ...]
    settings: StudySettings

    @property
    def series(self) -> tuple[str, ...]:
        """All series in the order of the study, without the full cache."""
        return tuple(dict.fromkeys(entry.series for place in self.places for entry in place.entries))

    @property
    def entries(self) -> Iterator[VariantEntry]:
        """All entries, those of the full cache too, in the order of the study."""
        for place in self.places:
            if place.full is not None:
                yield place.full
            yield from place.entries

    @cached_property
    def styles(self) -> dict[str, Style]:
        """How each series is drawn, through the whole report."""
        return styles(self.series, self.baseline_series)

    def style_of(self, entry: VariantEntry) -> Style:
        """Return how an entry is drawn."""
        return FULL_CACHE if entry.row.cell.name == REFERENCE else self.styles[entry.series]

    @cached_property
    def _compared(self) -> frozenset[tuple[str, int]]:
        metrics = {measure.metric for place in self.places for measure in place.measures}
        return frozenset((metric, effect.entry.number) for metric in metrics for effect in self.effects(metric))

    def link(self, entry: VariantEntry, metric: str) -> str:
        """Return a link to where an entry stands problem by problem; empty if it does so nowhere."""
        return f"#by-problem-{metric}-{entry.number}" if (metric, entry.number) in self._compared else ""

    def effects(self, metric: str) -> Iterator[Effect]:
        """Yield all differences of a metric in the study: what Holm's correction is for."""
        for place in self.places:
            for measure in place.measures:
                if measure.metric == metric:
                    for effects in measure.effects.values():
                        yield from effects


def build(results: Recorded, commands: Commands, asked: Asked | None = None) -> Report:
    """Return what a report says about a results file; the study's file, policies and data are not needed.

    Args:
        results: the results file.
        commands: how the report is made.
        asked: what the study asks for; what it asked for when it ran last if None.

    Raises:
        KVPolicyError: the file cannot be read, or names a baseline that it does not have.
    """
    asked = asked or Asked.last(results)
    study = asked.study
    rows = summarise(results, cells=asked.cells, study=study)
    axis = budget_axis([row.cell for row in rows if row.cell.name != REFERENCE])
    made = settings(results, asked)
    entries = [_entry(number, row, axis) for number, row in enumerate(rows)]
    wanted = tuple(name for name in study.get("metrics") or METRICS if name in METRICS)
    names = list(dict.fromkeys(row.cell.name for row in rows if row.cell.name != REFERENCE))
    # The only variant there is can still be compared with the full cache.
    baseline = study.get("compare_to") or (names[0] if len(names) > 1 else REFERENCE)
    effects = {name: _effects(entries, name, baseline, made.axes) for name in _qualities(rows, wanted)}
    places = dict.fromkeys((row.cell.model, row.cell.dataset) for row in rows)
    # Variants that come to the same policy share their runs.
    apart = {row.cell.keys: row for row in rows}.values()
    return Report(
        study=results.meta("study") or "study",
        description=study.get("description") or "",
        commands=commands,
        baseline=baseline,
        baseline_series=next((e.series for e in entries if e.row.cell.name == baseline), baseline),
        budgets=axis,
        places=tuple(_place(*place, entries, wanted, effects) for place in places),
        runs=sum(row.runs + row.failed for row in apart),
        failed=sum(row.failed for row in apart),
        asked=len(asked.keys),
        older=str(asked.older(results)),
        failures=failures(rows),
        refusals=tuple(refusals(rows)),
        cuts=tuple(cuts(rows)),
        settings=made,
    )


def _entry(number: int, row: VariantSummary, axis: BudgetAxis | None) -> VariantEntry:
    cell = row.cell
    if cell.name == REFERENCE or axis is None:
        return VariantEntry(row, cell.name, cell.condition, None, number)
    budget = budget_of(cell)
    series = without_budget(cell.name, cell) or str(cell.data.get("policy", cell.name))
    index = axis.texts.index(budget) if budget is not None and budget in axis.texts else None
    return VariantEntry(row, series, without_budget(cell.condition, cell), index, number)


def _qualities(rows: Sequence[VariantSummary], wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the metrics that say how good a variant is, as far as there are numbers."""
    return tuple(name for name in wanted if METRICS[name].quality and any(name in row.metrics for row in rows))


def _place(
    model: str,
    dataset: str,
    entries: Sequence[VariantEntry],
    wanted: Sequence[str],
    effects: Mapping[str, Sequence[Effect]],
) -> Place:
    here = [entry for entry in entries if (entry.row.cell.model, entry.row.cell.dataset) == (model, dataset)]
    return Place(
        model,
        dataset,
        next((entry for entry in here if entry.row.cell.name == REFERENCE), None),
        tuple(entry for entry in here if entry.row.cell.name != REFERENCE),
        tuple(name for name in wanted if any(name in entry.row.metrics for entry in here)),
        tuple(_measure(name, here, effects[name]) for name in _qualities([entry.row for entry in here], wanted)),
    )


def _measure(metric: str, here: Sequence[VariantEntry], effects: Sequence[Effect]) -> Measure:
    places = {id(entry) for entry in here}
    by_condition: dict[str, list[Effect]] = {}
    for effect in effects:
        if id(effect.entry) in places:
            by_condition.setdefault(effect.entry.row.cell.condition, []).append(effect)
    front, beaten = pareto(here, metric)
    grouped = {condition: tuple(_grouped(found)) for condition, found in by_condition.items()}
    return Measure(metric, front, beaten, grouped)


def _grouped(effects: Sequence[Effect]) -> list[Effect]:
    order = list(dict.fromkeys(effect.swapped for effect in effects))
    return sorted(effects, key=lambda effect: order.index(effect.swapped))


def pareto(entries: Sequence[VariantEntry], metric: str) -> tuple[tuple[VariantEntry, ...], tuple[VariantEntry, ...]]:
    """Return the entries that no other one beats, the fewest bytes first, and the others.

    One entry beats another if it is at least as good in the metric and in bytes, and better in one of them.

    Args:
        entries: those without both numbers are left out.
        metric: a metric of quality.
    """
    sign = -1 if METRICS[metric].better == "less" else 1
    both = [entry for entry in entries if metric in entry.row.metrics and BYTES in entry.row.metrics]
    both.sort(key=lambda e: (e.row.metrics[BYTES].value, -sign * e.row.metrics[metric].value))
    front: list[VariantEntry] = []
    best, size = -math.inf, math.inf
    for entry in both:
        value, taken = sign * entry.row.metrics[metric].value, entry.row.metrics[BYTES].value
        if value > best or (value == best and taken == size):
            front.append(entry)
            best, size = value, taken
    chosen = {id(entry) for entry in front}
    return tuple(front), tuple(entry for entry in both if id(entry) not in chosen)


def _effects(entries: Sequence[VariantEntry], metric: str, baseline: str, axes: Sequence[str]) -> list[Effect]:
    by_cell = {id(entry.row.cell): entry for entry in entries}
    bases = {
        (entry.row.cell.model, entry.row.cell.dataset, entry.row.cell.condition): entry
        for entry in entries
        if entry.row.cell.name == baseline
    }
    sign = -1 if METRICS[metric].better == "less" else 1
    found = []
    for comparison in compare([entry.row for entry in entries], metric, baseline):
        entry = by_cell[id(comparison.cell)]
        cell = comparison.cell
        base = bases[cell.model, cell.dataset, "" if baseline == REFERENCE else cell.condition]
        mine, its = entry.row.values[metric], base.row.values[metric]
        change = {number: sign * (mine[number] - its[number]) for number in mine if number in its}
        verdict = ""
        if comparison.p_holm < SIGNIFICANT:
            verdict = "better" if sign * comparison.difference.value > 0 else "worse"
        found.append(
            Effect(
                entry,
                base,
                comparison,
                *_swapped(entry, base, axes),
                tuple(number for number, by in change.items() if by > 0),
                tuple(number for number, by in change.items() if by < 0),
                tuple(number for number, by in change.items() if by == 0),
                verdict,
            )
        )
    return found


def _swapped(entry: VariantEntry, base: VariantEntry, axes: Sequence[str]) -> tuple[str, str]:
    """Return what differs between a variant and the baseline, and what it is in the variant.

    What differs are paths of the axes; for whole policies, their parts.
    """
    mine, its = entry.row.cell, base.row.cell
    if its.name == REFERENCE:
        return "the whole cache", mine.name
    paths = [path for path in axes if mine.settings.get(path) != its.settings.get(path)]
    if POLICY in paths:
        a, b = mine.data, its.data
        parts = [field for field in {**b, **a} if field not in _TEXTS and a.get(field) != b.get(field)]
        if len(paths) == 1 and 0 < len(parts) <= _MOST_PARTS:
            return " + ".join(parts), mine.name
        return "whole policy", mine.name
    values = [mine.settings[path] for path in paths if path in mine.settings]
    return " + ".join(paths) or "variant", ", ".join(values) if len(values) == len(paths) > 0 else mine.name
