"""How long a study will take: a short timed probe, multiplied."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from kvpolicy.errors import KVPolicyError
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
        KVPolicyError: a model cannot be loaded, or nothing of the study could be run.
    """
    runs = all_runs(plan, results)
    recorded = set() if results is None else results.finished(failed=False) | results.finished(failed=True)
    pending = [run for run in runs if run.key not in recorded]
    seconds = _seconds(plan, pending, threads) if probe else None
    return StudySize(
        len(plan.variants), len(runs), len(runs) - len(pending), sum(map(expected_tokens, pending)), seconds
    )


def _seconds(plan: Plan, pending: Sequence[Run], threads: int | None) -> float:
    """Return the time of all batches: the steps of the longest row times what a step of such a batch takes.

    A batch that the probe could not run takes none: it fails at once.
    """
    rates: dict[tuple[str, RunKind, str], float] = {}
    failed: dict[tuple[str, RunKind, str, str], str] = {}
    total = 0.0
    for task, runs in tasks_of(pending, plan.spec.batch, threads):
        place, digest = (task.model.name, task.kind, runs[0].dataset), runs[0].digest
        if place not in rates and (*place, digest) not in failed:
            found = _rate(runs, plan.spec.batch, threads)
            if isinstance(found, str):
                failed[(*place, digest)] = found
            else:
                rates[place] = found
        total += rates.get(place, 0.0) * max(map(expected_tokens, runs))
    if failed and not rates:
        raise KVPolicyError(f"the probe failed, as the study would: {next(iter(failed.values()))}")
    return total


def _rate(runs: Sequence[Run], batch: int, threads: int | None) -> float | str:
    """Return the seconds of one step of a batch; why it failed, if nothing of it can be run."""
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
    outcomes = execute(task)
    seconds = time.perf_counter() - start
    # Answers may end by themselves before the probe does.
    counted = "tokens" if task.kind == "generate" else "forced_tokens"
    steps = max(outcome.metrics.get(counted, 0.0) for outcome in outcomes)
    return seconds / steps if steps else next((outcome.error for outcome in outcomes if outcome.error), "no reason.")
