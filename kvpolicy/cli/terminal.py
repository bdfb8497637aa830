"""Consoles for standard output and standard error."""

from __future__ import annotations

import os

from rich.console import Console

_WIDTH_OF_FILES = 120


def output() -> Console:
    """Return a console on standard output; a pipe or a file gets lines of a fixed width."""
    return _console(stderr=False)


def messages() -> Console:
    """Return a console on standard error."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    return console
