"""Consoles for standard output and standard error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table

from kvpolicy.spec.odd_text import harmless

_WIDTH_OF_FILES = 120
_BOUNDLESS = 10_000


class _Harmless(Console):
    """A console on which text is only shown: what a terminal would obey in it is written out."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of an object; those that are control codes of rich itself stay."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else harmless(text), style, control)


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
    console = _Harmless(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    return console
