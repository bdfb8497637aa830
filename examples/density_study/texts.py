"""Texts of four kinds from what a Python installation holds: for choosing settings, and for measuring on others.

A document belongs to one split for ever: a hash of its name decides, so that no text that a setting was chosen on is
reported on.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal, get_args

Kind = Literal["code", "prose", "markdown", "maths"]
Split = Literal["train", "development", "test"]

_SHORTEST: Final = 6000  # characters


def split_of(name: str) -> Split:
    """Return the split of a document: six tenths train, two each for development and test."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10
    return "train" if place < 6 else "development" if place < 8 else "test"


def documents(kind: Kind, split: Split, *, maths: Path | None = None) -> list[str]:
    """Return the documents of a kind and split, in an order that hangs on their names only.

    Args:
        kind: "code" are modules of the standard library, "prose" the language reference that `pydoc` has and long
            docstrings, "markdown" the descriptions of installed packages, "maths" solutions from a file.
        split: which of them.
        maths: JSON Lines with a field `solution`, for "maths".
    """
    sources: dict[Kind, Callable[[], Iterator[tuple[str, str]]]] = {
        "code": _code, "prose": _prose, "markdown": _markdown, "maths": lambda: _maths(maths),
    }  # fmt: skip
    found = {name: text for name, text in sources[kind]() if len(text) >= _SHORTEST and split_of(name) == split}
    return [found[name] for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())]


def kinds(*, maths: Path | None) -> tuple[Kind, ...]:
    """Return the kinds that there are; "maths" only with a file."""
    return tuple(kind for kind in get_args(Kind) if kind != "maths" or maths is not None)


def _modules() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.split("/")[0] not in ("site-packages", "test", "idlelib", "lib2to3", "pydoc_data", "encodings"):
            yield name, path.read_text(encoding="utf-8", errors="replace")


def _code() -> Iterator[tuple[str, str]]:
    return _modules()


def _prose() -> Iterator[tuple[str, str]]:
    import pydoc_data.topics  # type: ignore[import-not-found]

    for name, text in pydoc_data.topics.topics.items():
        yield f"topic {name}", text
    for name, text in _modules():
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        nodes = [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef))]
        told = [doc for node in nodes if (doc := ast.get_docstring(node)) and len(doc) > 120]
        yield f"docstrings {name}", "\n\n".join(told)


def _markdown() -> Iterator[tuple[str, str]]:
    for package in importlib.metadata.distributions():
        text = str(package.metadata.get_payload() or "") or str(package.metadata.get("Description") or "")
        yield str(package.metadata["Name"]), text


def _maths(path: Path | None) -> Iterator[tuple[str, str]]:
    if path is None:
        raise SystemExit("maths: needs --maths FILE, JSON Lines with the fields problem and solution.")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # Solutions are short: those of one subject follow each other.
    for start in range(0, len(rows), 12):
        some = rows[start : start + 12]
        yield f"maths {start}", "\n\n".join(f"Problem: {row['problem']}\nSolution: {row['solution']}" for row in some)
