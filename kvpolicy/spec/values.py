"""What plain values of a specification may be, wherever they come from: bounded, and text that only shows something."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from kvpolicy.odd_text import odd_character
from kvpolicy.spec.problems import FieldError
from kvpolicy.spec.yaml_text import MAX_DEPTH, KeyPath

MAX_VALUES: Final = 100_000
LARGEST_INTEGER: Final = 1 << 64
"""Whole numbers up to here may stand in a specification; a seed has 64 bits, all others are bounded by their field."""


def check_values(data: Any, path: KeyPath = ()) -> None:
    """Raise FieldError at the first value that no specification can have.

    That is a text, key or value, with an odd character in it (`odd_text`), a number that is NaN or beyond
    `LARGEST_INTEGER`, and anything that is nested too deeply or without end.

    Args:
        data: mappings, lists and scalars as a file gives them; other objects are left alone.
        path: where they stand.
    """
    for number, (at, value) in enumerate(_walk(data, path)):
        if len(at) - len(path) > MAX_DEPTH:
            raise FieldError(at[: len(path) + 1], f"is nested more than {MAX_DEPTH} levels deep; write less.")
        if number > MAX_VALUES:
            raise FieldError(at[: len(path) + 1], f"has more than {MAX_VALUES:,} values; write less.")
        if isinstance(value, str):
            odd = odd_character(value)
            if odd is not None:
                raise FieldError(at, f"contains {odd}, which does something instead of showing something; remove it.")
        elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            digits = int(value.bit_length() * math.log10(2)) + 1
            raise FieldError(
                at, f"is a number of {digits:,} digits, more than can be counted here; write a smaller one."
            )
        elif isinstance(value, float) and math.isnan(value):
            raise FieldError(at, "NaN is not a number that can be used; write a number.")


def _walk(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every value, lists and mappings too, before what they hold, and a key before its value."""
    yield path, value
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield (*path, key) if isinstance(key, str) else path, key
            yield from _walk(item, (*path, key))
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index))
