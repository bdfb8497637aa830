"""Absolute paths in what is given to others: they say where one machine keeps its files, and nothing elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final

_PLACES: Final = ("base", "axes", "conditions", "models", "datasets")  # fields of a study that may name files


def short_paths(study: Mapping[str, Any]) -> dict[str, str]:
    """Return the absolute paths that a study names, with the end by which each is called.

    That is folder and name, or more where two paths end alike.
    """
    texts = dict.fromkeys(_texts([study.get(name) for name in _PLACES]))
    found = {text: parts for text in texts if (parts := _parts(text))}
    different = set(found.values())

    def end(parts: tuple[str, ...]) -> str:
        length = 2
        while any(other[-length:] == parts[-length:] for other in different - {parts}):
            length += 1
        return "/".join(parts[-length:])

    return {text: end(parts) for text, parts in found.items()}


def with_short_paths(value: Any, short: Mapping[str, str]) -> Any:
    """Return plain data with each text that is one of the paths replaced by what it is called."""
    if isinstance(value, str):
        return short.get(value, value)
    if isinstance(value, Mapping):
        return {name: with_short_paths(item, short) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_short_paths(item, short) for item in value]
    return value


def short_command(command: str, short: Mapping[str, str]) -> str:
    """Return a command whose absolute paths are called as elsewhere, or by their names."""
    words = ((word, _parts(word)) for word in shlex.split(command))
    return shlex.join(short.get(word, parts[-1] if parts else word) for word, parts in words)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)


def _parts(text: str) -> tuple[str, ...]:
    """Return the folders and the name of an absolute path, without its root; nothing of any other text."""
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(text)
        if "\n" not in text and path.is_absolute():
            return path.parts[1:]
    return ()
