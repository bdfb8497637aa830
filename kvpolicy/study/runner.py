"""Runs what a study still lacks and records it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from kvpolicy.runtimes.opening import first_line
from kvpolicy.study.asked import Asked, cells_so_far
from kvpolicy.study.environment import environment
from kvpolicy.study.executors import Executor, Outcomes
from kvpolicy.study.results import Results, ResultsError
from kvpolicy.study.runs import Plan, Run, tasks_of
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
        with writing(self.results.path):
            number = self.results.environment(environment())
            self._note_study()  # what was asked for before is older from now on, also if this is stopped
            self._stage("full cache", self.plan.reference_runs(), number)
            self._stage("variants", self._note_study(), number)

    def _note_study(self) -> list[Run]:
        """Record what the study asks for, as far as it can be said, and return all runs but those of the full cache."""
        cells = cells_so_far(self.plan, self.results)
        runs = self.plan.asked(cells, self.results.teachers())
        asked = Asked.of(self.plan, cells, runs)
        self.results.set_study(asked.study, asked.models, asked.cells)
        return self.plan.beside_reference(cells, runs)

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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Be the only one that writes a results file, inside the block.

    Args:
        path: the results file; ``.lock`` beside it is what is locked.

    Raises:
        ResultsError: another process writes it, or the lock cannot be made.
    """
    lock = FileLock(f"{path}.lock", timeout=0)
    try:
        if Path(lock.lock_file).is_symlink():
            raise ResultsError(f"{lock.lock_file}: is a symbolic link; remove it.")
        lock.acquire()
    except Timeout:
        raise ResultsError(
            f"{path}: another `kvpolicy study run` is writing it; wait for it, or name another file with --out."
        ) from None
    except OSError as error:
        raise ResultsError(
            f"{lock.lock_file}: cannot be made ({error.strerror}); name another file with --out."
        ) from None
    try:
        yield
    finally:
        lock.release()
