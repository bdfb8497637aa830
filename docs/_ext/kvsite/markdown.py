"""Pieces of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [_line(head), _line(["---"] * len(head)), *(_line(row) for row in rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) or "–" for cell in cells) + " |"


def code(text: str) -> str:
    """Return inline code."""
    return f"`{text}`" if text else ""


def text(docstring: str) -> str:
    """Return a docstring's prose: double backticks become single ones."""
    return docstring.replace("``", "`")


def tree(pages: Iterable[str], depth: int | None = None) -> str:
    """Return a hidden table of contents."""
    deep = [] if depth is None else [f":maxdepth: {depth}"]
    return "\n".join(["```{toctree}", ":hidden:", *deep, "", *pages, "```", ""])
