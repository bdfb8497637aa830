"""Runs what a study still lacks and records it."""

from __future__ import annotations

import json
import platform
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from filelock import FileLock, Timeout

from kvpolicy.runtimes.opening import first_line
from kvpolicy.study.executors import Executor, Outcomes
from kvpolicy.study.models import ModelRef
from kvpolicy.study.plan import Cell, Plan, Run, tasks_of
from kvpolicy.study.results import Results, ResultsError
from kvpolicy.study.work import Outcome, Task

Job = tuple[Task, list[Run]]


class Progress(Protocol):
    """Is told how far the study is."""

    def begin(self, stage: str, runs: int, tokens: int) -> None:
        """A stage starts that still has so many runs, about so many tokens."""

    def advance(self, runs: Sequence[Run], outcomes: Sequence[Outcome], tokens: int) -> None:
        """Runs have been recorded; `tokens` is what `begin` counted for them."""


def expected_tokens(run: Run) -> int:
    """Return about how many tokens a run takes: those of the known solution, or the most that are allowed."""
    if run.kind == "force":
        return len(run.teacher) or run.problem.cut[1]
    known = len(run.problem.solution.split())
    return min(known, run.sampling.max_new_tokens) if known else run.sampling.max_new_tokens


class Runner:
    """Runs a study.

    Args:
        plan: its runs.
        results: the file that records them.
        executor: where they run.
        progress: is told how far it is.
        retry_failed: run again what has failed before.
    """

    def __init__(
        self, plan: Plan, results: Results, executor: Executor, progress: Progress, *, retry_failed: bool = False
    ) -> None:
        self.plan = plan
        self.results = results
        self.executor = executor
        self.progress = progress
        self.retry_failed = retry_failed
        self._under_way: dict[Outcomes, Job] = {}

    def run(self) -> None:
        """Run everything that the results lack: the full cache first, then all variants.

        Raises:
            ResultsError: the file cannot be written, or another process is writing it.
        """
        lock = FileLock(f"{self.results.path}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ResultsError(
                f"{self.results.path}: another `kvpolicy study run` is writing it; wait for it, or name another file "
                "with --out."
            ) from None
        try:
            self.results.set_meta("spec", self.plan.spec.to_yaml())
            self.results.set_meta("models", json.dumps([_noted(model) for model in self.plan.models]))
            number = self.results.environment(environment())
            self._stage("full cache", self.plan.reference_runs(), number)
            cells = self.cells()
            self.results.set_cells(cells)
            self._stage("variants", self.plan.runs(cells, self.results.teachers()), number)
        finally:
            lock.release()

    def cells(self) -> list[Cell]:
        """Return the variants with their budgets, as far as the full cache has run."""
        return cells_so_far(self.plan, self.results)

    def _stage(self, name: str, runs: Sequence[Run], environment: int) -> None:
        done = self.results.finished(failed=False)
        if not self.retry_failed:
            done |= self.results.finished(failed=True)
        pending = [run for run in runs if run.key not in done]
        self.progress.begin(name, len(pending), sum(map(expected_tokens, pending)))
        jobs = tasks_of(pending, self.plan.spec.batch, self.executor.threads)
        self._work(deque(jobs), environment)

    def _work(self, waiting: deque[Job], environment: int) -> None:
        """Keep the workers busy; what was under way when a worker died is run again with nothing else beside it."""
        suspects: deque[Job] = deque()
        while waiting or suspects or self._under_way:
            while waiting and not suspects and len(self._under_way) < self.executor.slots + self.executor.ahead:
                self._submit(waiting.popleft())
            if suspects and not self._under_way:
                self._submit(suspects.popleft())
                alone = True
            else:
                alone = False
            finished, _ = wait(self._under_way, return_when=FIRST_COMPLETED)
            broken = [future for future in finished if isinstance(future.exception(), self.executor.crashed)]
            for future in finished:
                if future not in broken:
                    self._record(self._under_way.pop(future), future, environment)
            if broken:
                crashed = [self._under_way.pop(future) for future in list(self._under_way)]
                self.executor.restart()
                suspects.extend(self._isolated(crashed, alone=alone, environment=environment))

    def _submit(self, job: Job) -> None:
        try:
            future = self.executor.submit(job[0])
        except self.executor.crashed:  # between two looks; what was under way is noticed at the next one
            self.executor.restart()
            future = self.executor.submit(job[0])
        self._under_way[future] = job

    def _isolated(self, crashed: list[Job], *, alone: bool, environment: int) -> list[Job]:
        """Return what to try again: all as they were, or the halves of one that crashed with nothing beside it."""
        if not alone:
            return crashed
        ((_, runs),) = crashed
        if len(runs) == 1:
            message = "the worker process died, perhaps for lack of memory; use a smaller model or fewer workers."
            self._note(runs, [Outcome(error=message)], environment)
            return []
        middle = len(runs) // 2
        return [
            job for part in (runs[:middle], runs[middle:]) for job in tasks_of(part, len(part), self.executor.threads)
        ]

    def _record(self, job: Job, future: Outcomes, environment: int) -> None:
        error = future.exception()
        if error is None:
            self._note(job[1], future.result(), environment)
            return
        if not isinstance(error, Exception):
            raise error
        message = first_line(error) + "."
        self._note(job[1], [Outcome(error=message) for _ in job[1]], environment)

    def _note(self, runs: Sequence[Run], outcomes: Sequence[Outcome], environment: int) -> None:
        self.results.add(runs, outcomes, environment)
        self.progress.advance(runs, outcomes, sum(map(expected_tokens, runs)))


def cells_so_far(plan: Plan, results: Results) -> list[Cell]:
    """Return the variants with their budgets, as far as the full cache has run."""
    reference = plan.reference_runs()
    found = results.lengths(run.key for run in reference)
    lengths: dict[tuple[str, str], list[int]] = defaultdict(list)
    for run in reference:
        if run.key in found:
            lengths[run.model.name, run.dataset].append(found[run.key])
    return plan.cells(plan.traces(lengths))


def _noted(model: ModelRef) -> dict[str, Any]:
    """Return what identifies a model on any machine."""
    return {field: value for field, value in asdict(model).items() if field != "place"}


def environment() -> dict[str, Any]:
    """Return versions and machine, for the record."""
    packages = ("kvpolicy", "torch", "transformers", "datasets", "math-verify", "scipy", "ray")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
