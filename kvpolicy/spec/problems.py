"""Turns whatever is wrong with a specification into one sentence that names file, line, field and the mend."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kvpolicy.errors import SpecError, did_you_mean
from kvpolicy.spec.yaml_text import KeyPath, Mark


class FieldError(Exception):
    """Something wrong at a path of a specification; the public functions raise it as a SpecError by `located`."""

    def __init__(self, path: KeyPath, message: str, error: type[SpecError] = SpecError) -> None:
        super().__init__(f"{dotted(path)}: {message}" if path else message)
        self.path = path
        self.error = error

    def located(self, marks: Mapping[KeyPath, Mark] | None = None) -> SpecError:
        """Return the error to raise; with marks, it begins with the nearest ``file:line:column``."""
        if not marks:
            return self.error(str(self))
        for end in range(len(self.path), -1, -1):
            if self.path[:end] in marks:
                return self.error(f"{marks[self.path[:end]]}: {self}")
        return self.error(str(self))


def dotted(path: KeyPath) -> str:
    """Write a path as users do: ``protect.recent.count``."""
    parts = [str(part) if str(part).isprintable() else repr(part)[1:-1] for part in path]
    return ".".join(part if len(part) <= 60 else f"{part[:57]}..." for part in parts)


def shown(value: Any) -> str:
    """Return a short text for a value in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def from_pydantic(error: ValidationError, path: KeyPath, data: Any, owner: str, known: Iterable[str]) -> FieldError:
    """Translate pydantic's report: the first problem in words, and how many more there are.

    Args:
        error: what pydantic raised.
        path: where the validated data stands in the specification.
        data: the data that were validated, to tell real keys from pydantic's own path elements.
        owner: what an unknown key was given to, such as ``'window_attention'``.
        known: the keys that the owner has.
    """
    places: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        places.setdefault(_real(detail["loc"], data, detail["type"]), []).append(detail)
    (where, details), more = next(iter(places.items())), len(places) - 1
    # A union reports one detail per alternative, all for the same value.
    message = "; or: ".join(dict.fromkeys(_sentence(d, where, owner, list(known)) for d in details))
    if more:
        message += f" ({more} more problem{'s' if more > 1 else ''} after this one.)"
    return FieldError((*path, *where), message)


def _real(loc: tuple[int | str, ...], data: Any, kind: str) -> KeyPath:
    """Keep of pydantic's location what the data contains (and a missing key), not the names of union members."""
    path: list[int | str] = []
    for part in loc:
        inside = (isinstance(data, Mapping) and part in data) or (
            isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)
        )
        if inside:
            data = data[part]
        elif kind != "missing" or part != loc[-1]:
            continue
        path.append(part)
    return tuple(path)


def _sentence(detail: ErrorDetails, where: KeyPath, owner: str, known: list[str]) -> str:
    kind, given = detail["type"], detail["input"]
    if kind == "missing":
        return "is required."
    if kind == "extra_forbidden":
        name = str(where[-1]) if where else ""
        if len(where) > 1:
            return f"there is no key {name!r} here."
        return f"{owner} has no such parameter.{did_you_mean(name, known)} {_listed(known)}"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))
        near = did_you_mean(given, options) if isinstance(given, str) else ""
        return f"{_lower(message)}, got {shown(given)}.{near}"
    if kind in ("value_error", "assertion_error", "table"):
        names_it = kind == "table" or isinstance(given, Mapping) or not where
        return f"{message}." if names_it else f"{message}, got {shown(given)}."
    return f"{_lower(message)}, got {shown(given)}."


def _listed(known: list[str]) -> str:
    return f"Parameters: {', '.join(known)}." if known else "It has no parameters."


def _lower(message: str) -> str:
    return message.replace("Input should", "should", 1)
