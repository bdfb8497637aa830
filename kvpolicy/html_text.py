"""Small tables for notebooks: everything in them is text, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from kvpolicy.odd_text import harmless

_LONGEST: Final = 300
_CELL: Final = "text-align:left;vertical-align:top;padding:1px 10px 1px 0"


def safe(text: object) -> str:
    """Return a text for HTML, bounded and escaped; what would turn its direction is written out."""
    plain = harmless(str(text))
    return escape(plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]}…")


def facts(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """Return a table of labels and values under a title."""
    body = "".join(
        f'<tr><th style="{_CELL};font-weight:normal;opacity:.7">{safe(label)}</th>'
        f'<td style="{_CELL}">{safe(value)}</td></tr>'
        for label, value in rows
    )
    return f"<div><b>{safe(title)}</b><table>{body}</table></div>"


def grid(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table with a row of headings under a title."""
    top = "".join(f'<th style="{_CELL}">{safe(each)}</th>' for each in head)
    body = "".join("<tr>" + "".join(f'<td style="{_CELL}">{safe(each)}</td>' for each in row) + "</tr>" for row in rows)
    return f"<div><b>{safe(title)}</b><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def size(count: float) -> str:
    """Write bytes for people: ``1.50 MiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} bytes" if unit == "bytes" else f"{count:,.2f} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"
