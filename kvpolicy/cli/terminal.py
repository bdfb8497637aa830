"""Consoles for standard output and standard error."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_WIDTH_OF_FILES = 120
_BOUNDLESS = 10_000


def output() -> Console:
    """Return a console on standard output; a pipe or a file gets lines of a fixed width."""
    return _console(stderr=False)


def messages() -> Console:
    """Return a console on standard error."""
    return _console(stderr=True)


def widen(console: Console, tables: Sequence[Table]) -> None:
    """Make room for whole tables in a pipe or a file, which have no edge unless COLUMNS says so."""
    if not console.is_terminal and "COLUMNS" not in os.environ:
        boundless = console.options.update(max_width=_BOUNDLESS)
        needed = [Measurement.get(console, boundless, table).maximum for table in tables]
        console.width = max([console.width, *needed])


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    return console
