"""Absolute paths in what is given to others: they say where one machine keeps its files, and nothing elsewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final

from kvpolicy.study.sources import SOURCES

_PLACES: Final = ("base", "axes", "conditions", "models")  # fields of a study in which a text that is a path is one
_TABLE: Final = re.compile(r"(?:/|[A-Za-z]:\\)[^'\"\n{},]*\.safetensors")


def short_paths(study: Mapping[str, Any], policies: Iterable[str | None] = ()) -> dict[str, str]:
    """Return the absolute paths that a study names, with the end by which each is called; longer ones first.

    That is folder and name, or more where two paths end alike.

    Args:
        study: its fields, as plain values.
        policies: files of policies, whose tables may be named by their paths.
    """
    named = [study.get(name) for name in _PLACES]
    for each in study.get("datasets") or ():
        kind = SOURCES.get(str(each.get("use"))) if isinstance(each, Mapping) else None
        named += [each.get(field) for field in kind.files] if kind is not None else []
    tables = (found for text in dict.fromkeys(policies) for found in _TABLE.findall(text or ""))
    found = {text: parts for text in (*_texts(named), *tables) if (parts := _parts(text))}
    different = set(found.values())

    def end(parts: tuple[str, ...]) -> str:
        length = 2
        while any(other[-length:] == parts[-length:] for other in different - {parts}):
            length += 1
        return "/".join(parts[-length:])

    return {text: end(found[text]) for text in sorted(found, key=len, reverse=True)}


def with_short_paths(value: Any, short: Mapping[str, str]) -> Any:
    """Return plain data in whose texts each of the paths is what it is called."""
    if isinstance(value, str):
        for path, called in short.items():
            value = value.replace(path, called)
        return value
    if isinstance(value, Mapping):
        return {name: with_short_paths(item, short) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_short_paths(item, short) for item in value]
    return value


def short_command(command: str, short: Mapping[str, str]) -> str:
    """Return a command whose absolute paths are called as elsewhere, or by their names."""
    try:
        words = [(word, _parts(word)) for word in shlex.split(command)]
    except ValueError:  # a file that somebody wrote says what is no command line
        return command
    return shlex.join(short.get(word, parts[-1] if parts else word) for word, parts in words)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _parts(text: str) -> tuple[str, ...]:
    """Return the folders and the name of an absolute path, without its root; nothing of any other text."""
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(text)
        if "\n" not in text and path.is_absolute():
            return path.parts[1:]
    return ()
