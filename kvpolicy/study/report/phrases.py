"""Numbers as reports write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import nan
from typing import TYPE_CHECKING, Final

from kvpolicy.study.analysis import Estimate, shown
from kvpolicy.study.metrics import METRICS

if TYPE_CHECKING:
    from kvpolicy.study.report.content import Measure

_PAIRED: Final = "Tango's, which belongs to McNemar's test, and p is of McNemar's exact test"
_MEANS: Final = "a paired bootstrap's, and p is of a sign-flip permutation test"


def value(estimate: Estimate, metric: str) -> str:
    """Return the mean alone, shares in percent: ``93.0``."""
    return shown(replace(estimate, low=nan, high=nan), metric)


def interval(estimate: Estimate, metric: str) -> str:
    """Return the interval alone, ``[86.3, 96.6]``; empty where there is none, or where it is not of interest."""
    _, bracket, rest = shown(estimate, metric).partition("[")
    return bracket + rest


def probability(p: float) -> str:
    """Return a p value: two digits that count, and no more zeros than one reads."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def numbers(values: Sequence[int]) -> str:
    """Return the numbers of problems, runs of them shortened: ``0–3, 7``; a dash if there are none."""
    runs: list[list[int]] = []
    for number in sorted(values):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [
        f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run))  # two are as short with a comma
        for run in runs
    ]
    return ", ".join(parts) or "–"


def count(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 run``, ``2 runs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a time in a unit of fitting size."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def method_of(measure: Measure) -> str:
    """Return whose the intervals and p values of a measure's differences are."""
    paired = {effect.comparison.paired for effects in measure.effects.values() for effect in effects}
    if paired == {True}:
        return _PAIRED
    return f"{_PAIRED} where all are right or wrong; otherwise {_MEANS}" if True in paired else _MEANS


def title(metric: str) -> str:
    """Return a metric's title as the beginning of a sentence."""
    text = METRICS[metric].title
    return text[:1].upper() + text[1:]
