"""Consoles for standard output and standard error: what is printed on them is text, whoever wrote it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.progress import TextColumn
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

from kvpolicy.odd_text import harmless

_WIDTH_OF_FILES = 120
_BOUNDLESS = 10_000


class _Plain(Console):
    """A console on which text is only shown: it has no markup, and what a terminal would obey in it is written out.

    Style comes from arguments and from `rich.text.Text`, never from square brackets, which may be a user's.
    """

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Return a line with a spinner, for a ``with`` block; its text is text, too."""
        return _PlainStatus(status, console=self, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of an object; those that are control codes of rich itself stay."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else harmless(text), style, control)


class _PlainStatus(Status):
    # rich takes a string for markup here, whatever the console says.

    def __init__(self, status: RenderableType, **options: Any) -> None:
        super().__init__(_text(status), **options)

    def update(self, status: RenderableType | None = None, **options: Any) -> None:
        super().update(None if status is None else _text(status), **options)


def _text(what: RenderableType) -> RenderableType:
    return Text(what) if isinstance(what, str) else what


def text_column(template: str) -> TextColumn:
    """Return a column of text for a progress bar, such as ``{task.description}``."""
    return TextColumn(template, markup=False)


def output() -> Console:
    """Return a console on standard output; a pipe or a file gets lines of a fixed width."""
    return _console(stderr=False)


def messages() -> Console:
    """Return a console on standard error."""
    return _console(stderr=True)


def widen(console: Console, tables: Sequence[Table]) -> None:
    """Make room for whole tables in a pipe or a file, which have no edge unless COLUMNS says so."""
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max([console.width, *(width_of(console, table) for table in tables)])


def width_of(console: Console, table: Table) -> int:
    """Return how wide a table is if nothing in it is broken."""
    return Measurement.get(console, console.options.update(max_width=_BOUNDLESS), table).maximum


def _console(*, stderr: bool) -> Console:
    console = _Plain(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_FILES
    return console
