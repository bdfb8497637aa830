"""Numbers as reports write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import nan

from kvpolicy.study.analysis import Estimate, shown
from kvpolicy.study.metrics import METRICS


def value(estimate: Estimate, metric: str) -> str:
    """Return the mean alone: ``0.930``."""
    return shown(replace(estimate, low=nan, high=nan), metric)


def interval(estimate: Estimate, metric: str) -> str:
    """Return the interval alone, ``[0.863, 0.966]``; empty where there is none, or where it is not of interest."""
    _, bracket, rest = shown(estimate, metric).partition("[")
    return bracket + rest


def bounds(pair: tuple[float, float] | None, metric: str) -> str:
    """Return two bounds as an interval; empty if there are none."""
    if pair is None:
        return ""
    low, high = (f"{bound:.{METRICS[metric].digits}f}" for bound in pair)
    return f"[{low}, {high}]"


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


def title(metric: str) -> str:
    """Return a metric's title as the beginning of a sentence."""
    text = METRICS[metric].title
    return text[:1].upper() + text[1:]
