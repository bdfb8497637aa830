"""Turns whatever is wrong with a specification into one sentence that names file, line, field and the mend."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kvpolicy.errors import SpecError, did_you_mean
from kvpolicy.loading import entries
from kvpolicy.spec.yaml_text import Fault, KeyPath, Mark


class FieldError(Exception):
    """Something wrong at a path of a specification; the public functions raise it as a SpecError by `located`.

    Attributes:
        path: where it is.
        message: what is wrong, without the path.
        error: what to raise.
        others: what else is wrong.
        mark: the place in a file, once it is known.
    """

    def __init__(
        self,
        path: KeyPath,
        message: str,
        error: type[SpecError] = SpecError,
        others: Sequence[FieldError] = (),
        mark: Mark | None = None,
    ) -> None:
        message = " ".join(message.split())  # it may quote names in which lines end
        super().__init__(f"{dotted(path)}: {message}" if path else message)
        self.path = path
        self.message = message
        self.error = error
        self.others = tuple(others)
        self.mark = mark

    def __iter__(self) -> Iterator[FieldError]:
        """Yield this one and the others."""
        yield self
        yield from self.others

    def below(self, path: KeyPath) -> FieldError:
        """Return the same with a longer path, for what is part of something else."""
        return together([FieldError((*path, *each.path), each.message, each.error, mark=each.mark) for each in self])

    def placed(self, marks: Mapping[KeyPath, Mark]) -> FieldError:
        """Return the same with the nearest mark for each problem, in the order of places."""
        found = [FieldError(p.path, p.message, p.error, mark=p.mark or _nearest(p.path, marks)) for p in self]
        return together(sorted(found, key=lambda problem: problem.mark or Mark("", 0, 0)))

    def located(self, marks: Mapping[KeyPath, Mark] | None = None) -> SpecError:
        """Return the error to raise; with marks, sentences begin with ``file:line:column`` and stand in that order."""
        placed = self.placed(marks or {})
        sentences = [str(problem) if problem.mark is None else f"{problem.mark}: {problem}" for problem in placed]
        return placed.error.of(sentences)


class Problems:
    """Collects what is wrong with a specification, so that all of it is said at once: ``with problems: ...``.

    Args:
        faults: what reading the file found. What then seems wrong with a value that is not known follows from that.
    """

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self.found = [FieldError((), fault.message, mark=fault.mark) for fault in faults]
        self._settled = [fault.path for fault in faults if fault.path and not fault.known]
        self._left_out = {path[0] for path in self._settled}

    def __enter__(self) -> None:
        """Begin a block; a problem that it raises is taken, and what stands behind it goes on."""

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> bool:
        """Take what the block raised, if it is a FieldError."""
        if not isinstance(error, FieldError):
            return False
        self.found += (p for p in error if not any(p.path[: len(path)] == path for path in self._settled))
        return True

    def leave_out(self, field: str) -> None:
        """Do not ask for a field either: what is wrong elsewhere stands for it."""
        self._left_out.add(field)

    @property
    def fields(self) -> set[str | int]:
        """The fields that are known to be wrong, so that nothing follows from what they say or from their absence."""
        return self._left_out | {problem.path[0] for problem in self.found if problem.path}

    def check(self) -> None:
        """Raise a FieldError with all that was found, if anything was."""
        if self.found:
            raise together(self.found)


def together(problems: Sequence[FieldError]) -> FieldError:
    """Return one error for several problems, at least one."""
    first, *others = problems
    return FieldError(first.path, first.message, first.error, others, first.mark)


def _nearest(path: KeyPath, marks: Mapping[KeyPath, Mark]) -> Mark | None:
    return next((marks[path[:end]] for end in range(len(path), -1, -1) if path[:end] in marks), None)


def dotted(path: KeyPath) -> str:
    """Write a path as users do: ``protect.recent.count``."""
    parts = [str(part) if str(part).isprintable() else repr(part)[1:-1] for part in path]
    return ".".join(part if len(part) <= 60 else f"{part[:57]}..." for part in parts)


def shown(value: Any) -> str:
    """Return a short text for a value in a message."""
    return entries.shown(value, longest=60)


def from_pydantic(error: ValidationError, path: KeyPath, data: Any, owner: str, known: Iterable[str]) -> FieldError:
    """Translate pydantic's report into words; iterating over the result yields a problem for each place.

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
    listed, problems = list(known), []
    for where, details in places.items():
        # Pydantic counts the items that it could read, and what is wrong with the others is said.
        beneath = any(len(other) > len(where) and other[: len(where)] == where for other in places)
        if beneath and all(detail["type"] == "too_short" for detail in details):
            continue
        # A union reports one detail per alternative, all for the same value.
        sentences = dict.fromkeys(_sentence(detail, where, owner, listed) for detail in details)
        *first, last = sentences
        problems.append(FieldError((*path, *where), "; or ".join([*(each.rstrip(".") for each in first), last])))
    return together(problems)


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
    if kind == "too_short":
        message = f"should have at least {detail['ctx']['min_length']} of them"
        given = list(given) if isinstance(given, tuple) else given
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
