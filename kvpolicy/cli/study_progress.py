"""A progress bar for studies; without a terminal, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from threading import Event, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn

from kvpolicy.cli.terminal import text_column

if TYPE_CHECKING:
    from rich.console import Console

    from kvpolicy.study.runs import Run
    from kvpolicy.study.work import Outcome

_FIRST_LINE = 30.0
"""Seconds until the first line; each pause is twice as long as the one before, up to the longest."""
_LONGEST_PAUSE = 600.0


class Bar:
    """Shows how many runs are done, tokens per second, the time that passed, and the time that is left.

    Args:
        console: where to; usually standard error.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            text_column("{task.description}"),
            BarColumn(),
            text_column("{task.fields[runs]} runs"),
            text_column("{task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            text_column("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=600,
        )
        self._task: TaskID | None = None
        self._silent = Event()  # no line is to come
        self._silent.set()
        self._total = self._done = self._failed = self._made = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._silent.set()
        self._progress.stop()

    def begin(self, stage: str, runs: int, tokens: int) -> None:
        """Start a bar of so many runs and tokens."""
        self._stage, self._total, self._done, self._failed, self._made = stage, runs, 0, 0, 0
        self._start = time.monotonic()
        self._task = None
        self._silent.set()
        if runs and not self._console.is_terminal:
            # A line of its own time: a batch may take longer than a reader of a log waits.
            self._silent = Event()
            Thread(target=self._lines, args=(self._silent,), daemon=True).start()
        if runs:
            self._task = self._progress.add_task(stage, total=tokens, runs=self._runs(), speed="-")

    def advance(self, runs: Sequence[Run], outcomes: Sequence[Outcome], tokens: int) -> None:
        """Move the bar on."""
        assert self._task is not None
        self._done += len(runs)
        self._failed += sum(outcome.error is not None for outcome in outcomes)
        self._made += sum(int(o.metrics.get("tokens", o.metrics.get("forced_tokens", 0))) for o in outcomes)
        self._progress.update(self._task, advance=tokens, runs=self._runs(), speed=self._speed())
        if self._done == self._total and not self._console.is_terminal:
            self._silent.set()
            self._line()

    def _lines(self, silent: Event) -> None:
        """Print a line now and then, until there is no more to come."""
        pause = _FIRST_LINE
        while not silent.wait(pause):
            self._line()
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _line(self) -> None:
        elapsed = time.monotonic() - self._start
        self._console.print(f"{self._stage}: {self._runs()} runs, {self._speed()} tokens/s, {elapsed:.0f} s")

    def _speed(self) -> str:
        return f"{self._made / max(time.monotonic() - self._start, 1e-9):,.0f}"

    def _runs(self) -> str:
        failed = f" ({self._failed} failed)" if self._failed else ""
        return f"{self._done}/{self._total}{failed}"
