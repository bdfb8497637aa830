"""How long a study will take: a short timed probe, multiplied."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from kvpolicy.study.asked import cells_so_far
from kvpolicy.study.metrics import RunKind
from kvpolicy.study.results import Results
from kvpolicy.study.runner import expected_tokens
from kvpolicy.study.runs import Plan, Run, tasks_of
from kvpolicy.study.work import execute

PROBE_TOKENS: Final = 48
"""Tokens that the probe generates or reads in each row."""


@dataclass(frozen=True)
class StudySize:
    """How large a study is.

    Attributes:
        variants: policies that are compared, conditions counted, without the full cache.
        runs: all runs.
        done: runs that are recorded already.
        tokens: about how many tokens the others take; an upper limit where answers have no known length.
        seconds: about how long they take with one worker; None without a probe.
    """

    variants: int
    runs: int
    done: int
    tokens: int
    seconds: float | None = None


def all_runs(plan: Plan, results: Results | None) -> list[Run]:
    """Return every run, with budgets and teachers as far as the full cache has run; placeholders otherwise."""
    reference = plan.reference_runs()
    if results is None:
        traces = plan.traces(_guessed(reference))
        teachers = {run.key: (0,) * expected_tokens(run) for run in reference}
        cells = plan.cells(traces)
        return [*reference, *plan.beside_reference(cells, plan.asked(cells, teachers))]
    known = results.lengths(run.key for run in reference)
    if not known:
        return all_runs(plan, None)
    cells = cells_so_far(plan, results)
    return [*reference, *plan.beside_reference(cells, plan.asked(cells, results.teachers()))]


def _guessed(reference: Sequence[Run]) -> dict[tuple[str, str], list[int]]:
    lengths: dict[tuple[str, str], list[int]] = defaultdict(list)
    for run in reference:
        lengths[run.model.name, run.dataset].append(len(run.problem.prompt.split()) + expected_tokens(run))
    return lengths


def measure(plan: Plan, results: Results | None = None, *, probe: bool = True, threads: int | None = None) -> StudySize:
    """Count runs and tokens, and estimate the time.

    Args:
        plan: the study.
        results: what has been done; None if nothing has.
        probe: run a few tokens of each model and kind of run.
        threads: threads of torch during the probe.

    Raises:
        KVPolicyError: the probe failed: the study would, too.
    """
    runs = all_runs(plan, results)
    recorded = set() if results is None else results.finished(failed=False) | results.finished(failed=True)
    pending = [run for run in runs if run.key not in recorded]
    seconds = _seconds(plan, pending, threads) if probe else None
    return StudySize(
        len(plan.variants), len(runs), len(runs) - len(pending), sum(map(expected_tokens, pending)), seconds
    )


def _seconds(plan: Plan, pending: Sequence[Run], threads: int | None) -> float:
    """Return the time of all batches: the steps of the longest row times what a step of such a batch takes."""
    rates: dict[tuple[str, RunKind, str], float] = {}
    total = 0.0
    for task, runs in tasks_of(pending, plan.spec.batch, threads):
        place = (task.model.name, task.kind, runs[0].dataset)
        if place not in rates:
            rates[place] = _rate(runs, plan.spec.batch, threads)
        total += rates[place] * max(map(expected_tokens, runs))
    return total


def _rate(runs: Sequence[Run], batch: int, threads: int | None) -> float:
    """Return the seconds of one step of a batch."""
    short = [
        replace(
            run,
            sampling=run.sampling.model_copy(update={"max_new_tokens": PROBE_TOKENS}),
            teacher=run.teacher[:PROBE_TOKENS],
            problem=replace(run.problem, cut=(min(run.problem.cut[0], 8), min(run.problem.cut[1], 8 + PROBE_TOKENS))),
        )
        for run in runs
    ]
    ((task, _),) = tasks_of(short, batch, threads)
    execute(replace(task, items=task.items[:1]))  # loads the model, and pays for what happens once
    start = time.perf_counter()
    execute(task)
    return (time.perf_counter() - start) / PROBE_TOKENS
