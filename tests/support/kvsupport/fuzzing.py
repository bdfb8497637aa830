"""What the fuzzers share: numbered cases, the bounds that each must keep, and ways to spoil a file.

`KVPOLICY_FUZZ_SEED` starts elsewhere and `KVPOLICY_FUZZ_CASES` runs more; a failure names the number of its case, which
alone repeats it.
"""

from __future__ import annotations

import copy
import os
import random
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvpolicy.odd_text import odd_character

Path = tuple[str | int, ...]
FIRST = int(os.environ.get("KVPOLICY_FUZZ_SEED", "0"))
SECONDS = 10  # of processor time: a busy machine is no hang
MEMORY = 1 << 30
DEEP: object = "x"
for _ in range(60):
    DEEP = [DEEP]

ANYTHING = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 2**31, 2**31 + 1, 2**64, 10**30, 10**400, -(10**30), 0.0, 0.5, -0.1, 1.5,
    1e308, float("inf"), float("nan"), "", " ", "x", "8", "0.5", "true", "null", "no", "rkv", "full", "x" * 5000,
    "é\u2028\x85", "a\nb", "../..", "/etc/passwd", "{", "%s%n", "{0}", "[/x]", "[bold]", [], [1], ["rkv", "rkv"],
    [[]], {}, {"use": 3}, {"use": None}, {"every": 3}, {"": 1}, {"a": {"b": {"c": 1}}}, DEEP, "\x1b]0;x\x07", "a\0b",
    "\u202ex", "\ud800", ["\x9b"], {"\x1b": 1},
]  # fmt: skip
"""Values that may stand anywhere in a file."""

YAML = [
    "!!python/object/apply:os.system ['touch {mark}']", "!!python/object/new:pathlib.Path [{mark}]", "!!int 4",
    "!!binary aGVsbG8=", "!!set {{a, b}}", "!custom x", "&a [*a]", "*a", "<<: *a", "? [a, b]\n: c", "---", "...",
    "%YAML 1.1", "%TAG ! tag:x,2000:", "\t", "- ", ": ", "#", "|", ">-\n  a", "'", '"', r'"\x00"', r'"\ud800"',
    r'"\e]0;x"', "[[[[", "{{{{", "]]", "}}}}", "\u0000", "\u0007", "\ufeff", "\u2028", "é", "\U0001f600", "0x",
    "1_000", "9" * 5000, "0x" + "f" * 5000, "1e999", ".nan", "-.inf", "190:20:30", "=", "~", "2001-01-01", "@", "`",
    "a: b: c",
]  # fmt: skip
"""Pieces of YAML that may stand anywhere; ``{mark}`` is a file that must not come to be."""


def cases(name: str, default: int) -> Iterator[tuple[int, random.Random]]:
    """Yield the numbers of the cases, and random numbers that hang on the name and the number alone."""
    for number in range(FIRST, FIRST + int(os.environ.get("KVPOLICY_FUZZ_CASES", default))):
        yield number, random.Random(f"{name} {number}")


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """Fail if the block takes too long, or if anything but an AssertionError leaves it.

    It uses the alarm of the process, as pytest-timeout does: tests that call this are marked ``timeout(0)``.
    """

    def late(*_: object) -> None:
        raise AssertionError(f"{what}: it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30 * SECONDS)
    start = time.process_time()
    try:
        yield
    except AssertionError:
        raise
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - start < SECONDS, f"{what}: too slow"


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Fail if the most memory that this process has held grows by more than a GiB."""

    def most() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    before = most()
    yield
    assert most() - before < MEMORY


def check_mixture(share: float, *counts: int) -> None:
    """Assert that each of some outcomes has its share of at least a hundred cases: neither harmless nor hopeless."""
    assert sum(counts) < 100 or min(counts) >= share * sum(counts), counts


def check_sentence(text: str, what: object) -> None:
    """Assert that a message is one harmless sentence."""
    assert len(text.splitlines()) == 1, (what, text)
    assert len(text) < 2500, (what, text)
    assert odd_character(text) is None, (what, text)


def places(data: Any, path: Path = ()) -> list[Path]:
    """Return the paths of all values of a parsed file."""
    found = [path] if path else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def parent_of(data: Any, path: Path) -> Any:
    """Return what holds the last part of a path."""
    for key in path[:-1]:
        data = data[key]
    return data


def misspelt(draw: random.Random, word: str) -> str:
    """Return a word with a letter too few or too many, or worse."""
    i = draw.randrange(len(word) + 1)
    letter = draw.choice("aez_-. :{[\n\0é")
    return draw.choice(
        [word[:i] + word[i + 1 :], word[:i] + letter + word[i:], word[::-1], word.upper(), word * 50, ""]
    )


def change_structure(draw: random.Random, data: Any, values: Sequence[Any], keys: Sequence[str]) -> None:
    """Change a parsed file in one place.

    Args:
        draw: random numbers.
        data: the file, changed in place.
        values: what may stand anywhere.
        keys: names that may be a key anywhere, besides those of the file.
    """
    path = draw.choice(places(data))
    parent, key = parent_of(data, path), path[-1]
    other = draw.choice(places(data))
    kind = draw.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind <= 2:
        parent[key] = copy.deepcopy(draw.choice(values))
    elif kind == 3 and isinstance(parent, dict):
        parent[misspelt(draw, str(key))] = parent.pop(key)
    elif kind == 4:
        parent[key] = [parent[key]] if draw.random() < 0.5 else {draw.choice(keys): parent[key]}
    elif kind == 5:
        parent[key] = copy.deepcopy(parent_of(data, other)[other[-1]])
    elif kind == 6 and isinstance(parent, dict):
        parent[draw.choice([*data, *parent, *keys])] = copy.deepcopy(draw.choice(values))
    elif isinstance(parent[key], str):
        parent[key] = misspelt(draw, parent[key])
    elif isinstance(parent[key], int | float):
        parent[key] = draw.choice([-1, 1000, 0.001, -parent[key], str(parent[key])])


def change_text(draw: random.Random, text: str, mark: object, pieces: Sequence[str] = ()) -> str:
    """Return a file's text changed in one place."""
    pieces = [piece.format(mark=mark) for piece in (*YAML, *pieces)]
    lines = text.split("\n")
    kind, n = draw.randrange(9), draw.randrange(len(lines))
    if kind == 0:
        lines.insert(n, draw.choice(lines))
    elif kind == 1:
        del lines[n]
    elif kind == 2:
        lines[n] = draw.choice([" ", "  ", "\t", "- "]) + lines[n]
    elif kind == 3:
        draw.shuffle(lines)
    elif kind == 4:
        lines.insert(n, draw.choice(pieces))
    elif kind == 5:
        head, colon, _ = lines[n].partition(": ")
        lines[n] = head + (colon or ": ") + draw.choice(pieces)
    elif kind == 6:
        i = draw.randrange(len(lines[n]) + 1)
        lines[n] = lines[n][:i] + draw.choice(pieces) + lines[n][i:]
    elif kind == 7:
        return draw.choice(["\r\n", "\r", "\u2028", "\n\n"]).join(lines)
    else:
        return text[: draw.randrange(len(text) + 1)]
    return "\n".join(lines)


def damaged(draw: random.Random, raw: bytes) -> bytes:
    """Return bytes with some of them changed."""
    spoilt = bytearray(raw)
    for _ in range(draw.randint(1, 6)):
        i = draw.randrange(len(spoilt) + 1)
        kind = draw.randrange(4)
        if kind == 0 and i < len(spoilt):
            spoilt[i] ^= 1 << draw.randrange(8)
        elif kind == 1:
            spoilt[i:i] = draw.randbytes(draw.randint(1, 4))
        elif kind == 2:
            del spoilt[i : i + draw.randint(1, 20)]
        else:
            j = draw.randrange(len(spoilt) + 1)
            spoilt[i:i] = spoilt[j : j + 30]
    return bytes(spoilt)
