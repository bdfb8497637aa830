"""The generated parts of docs/laws.md and docs/mutations.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from kvpolicy.testing.laws import LAW_KINDS, LAWS
from kvsupport.mutants import Caught

_THEMES = {
    "inputs": "What is read and written",
    "symmetry": "What must not matter",
    "parts": "One kind each",
    "selection": "Kept sets",
    "engine": "Policies over time",
    "machine": "Any sequence of operations",
}
_BEGIN, _END = "<!-- generated: begin -->", "<!-- generated: end -->"


def laws_text() -> str:
    """Return the list of all laws in markdown."""
    lines = []
    for theme, title in _THEMES.items():
        lines += [f"### {title}", ""]
        for law in LAWS.values():
            if law.theme == theme:
                about = ", ".join(kind for kind in LAW_KINDS if kind in law.kinds)
                words = " ".join(law.text.split())
                lines += [f"- **`{law.name}`** ({about}): {words} *{law.reason}*"]
        lines.append("")
    return "\n".join(lines).strip() + "\n"


def mutations_text(rows: Iterable[Caught]) -> str:
    """Return the table of mutants and the laws that catch them in markdown."""
    lines = ["| broken | what is wrong | seen in, or rule | caught by |", "|---|---|---|---|"]
    for row in rows:
        laws = ", ".join(f"`{law}`" for law in row.laws) or "**nothing**"
        lines.append(f"| {row.kind} | {row.mutant.name} | {row.mutant.seen_in} | {laws} |")
    return "\n".join(lines) + "\n"


def mutations_in(text: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """Read the table back: (broken, what is wrong) -> laws."""
    rows = {}
    for line in generated(text).splitlines()[2:]:
        kind, name, _, laws = (cell.strip() for cell in line.strip("|").split(" | "))
        rows[kind, name] = tuple(re.findall(r"`(\w+)`", laws))
    return rows


def generated(page: str) -> str:
    """Return the generated part of a page."""
    return page.partition(_BEGIN)[2].partition(_END)[0].strip() + "\n"


def replaced(page: str, text: str) -> str:
    """Return the page with another generated part."""
    before, _, rest = page.partition(_BEGIN)
    return f"{before}{_BEGIN}\n\n{text}\n{_END}{rest.partition(_END)[2]}"


def write(path: Path, text: str) -> bool:
    """Replace the generated part of a file; return whether it has changed."""
    page = path.read_text(encoding="utf-8")
    new = replaced(page, text)
    path.write_text(new, encoding="utf-8")
    return new != page
