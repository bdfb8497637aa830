"""A progress bar for studies; without a terminal, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from rich.console import Console

    from kvpolicy.study.runs import Run
    from kvpolicy.study.work import Outcome

_LINE_SECONDS = 30.0


class Bar:
    """Shows how many runs are done, tokens per second, the time that passed, and the time that is left.

    Args:
        console: where to; usually standard error.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[runs]} runs"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=600,
        )
        self._task: TaskID | None = None
        self._next_line = 0.0
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
        self._progress.stop()

    def begin(self, stage: str, runs: int, tokens: int) -> None:
        """Start a bar of so many runs and tokens."""
        self._stage, self._total, self._done, self._failed, self._made = stage, runs, 0, 0, 0
        self._start = time.monotonic()
        self._next_line = self._start + _LINE_SECONDS
        self._task = None
        if runs:
            self._task = self._progress.add_task(stage, total=tokens, runs=self._runs(), speed="-")

    def advance(self, runs: Sequence[Run], outcomes: Sequence[Outcome], tokens: int) -> None:
        """Move the bar on."""
        assert self._task is not None
        self._done += len(runs)
        self._failed += sum(outcome.error is not None for outcome in outcomes)
        self._made += sum(int(o.metrics.get("tokens", o.metrics.get("forced_tokens", 0))) for o in outcomes)
        now = time.monotonic()
        speed = f"{self._made / max(now - self._start, 1e-9):,.0f}"
        self._progress.update(self._task, advance=tokens, runs=self._runs(), speed=speed)
        if not self._console.is_terminal and (now >= self._next_line or self._done == self._total):
            self._next_line = now + _LINE_SECONDS
            elapsed = now - self._start
            self._console.print(f"{self._stage}: {self._runs()} runs, {speed} tokens/s, {elapsed:.0f} s")

    def _runs(self) -> str:
        failed = f" ({self._failed} failed)" if self._failed else ""
        return f"{self._done}/{self._total}{failed}"
