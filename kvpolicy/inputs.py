"""Files that users name: read within bounds and never waited for, and one sentence for whatever is wrong with them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Final

from kvpolicy.errors import KVPolicyError

MAX_TEXT_BYTES: Final = 1 << 26
"""Larger texts are refused; the longest books have a tenth of it."""

_LONGEST_PATH: Final = 300


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with a leading ``~`` written out; where there is no such user it stays, and so there is no file."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def read_text(
    path: Path, what: str, *, most: int = MAX_TEXT_BYTES, option: str = "", error: type[KVPolicyError] = KVPolicyError
) -> str:
    """Return the text of a UTF-8 file, without a byte-order mark; arguments and errors are those of `read_bytes`."""
    raw = read_bytes(path, what, most=most, option=option, error=error)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{_begin(path, option)} is not UTF-8 text (byte {problem.start}); give a {what}.") from None


def read_bytes(
    path: Path, what: str, *, most: int, option: str = "", error: type[KVPolicyError] = KVPolicyError
) -> bytes:
    """Return the content of an ordinary file.

    Args:
        path: the file.
        what: what it should be, for errors: ``policy file``.
        most: bytes that it may have.
        option: what errors begin with, such as ``--text``.
        error: what to raise.

    Raises:
        KVPolicyError: there is no such file, or it is a folder, a device, a pipe, too large, or cannot be read at once.
    """
    parts: list[bytes] = []
    left = most + 1
    with _opened(path, what, option, error) as file:
        while left and (part := _part(file, left)):
            parts.append(part)
            left -= len(part)
    if not left:
        size = f"{most >> 10} KiB" if most < 1 << 24 else f"{most >> 20} MiB"
        raise error(f"{_begin(path, option)} is larger than {size}; that is not a {what}.")
    return b"".join(parts)


def require_ordinary(path: Path, what: str, *, option: str = "", error: type[KVPolicyError] = KVPolicyError) -> None:
    """Raise as `read_bytes` does, for a file that a library will open by itself: it might wait for ever."""
    with _opened(path, what, option, error) as file:
        _part(file, 1)


@contextmanager
def _opened(path: Path, what: str, option: str, error: type[KVPolicyError]) -> Iterator[FileIO]:
    """Open a file so that no read waits, inside the block; raises as `read_bytes`."""
    begin = _begin(path, option)
    try:
        wrong = _wrong_kind(path, what)
        if not wrong:
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            with FileIO(os.open(path, flags)) as file:
                yield file
    except BlockingIOError:
        wrong = f"is not an ordinary file, but one that is waited for; give a {what}"
    except OSError as problem:
        wrong = f"cannot be read ({problem.strerror})"
    if wrong:
        raise error(f"{begin} {wrong}.")


def _wrong_kind(path: Path, what: str) -> str:
    """Say what a path is instead of an ordinary file; raises OSError.

    Asked before it is opened: that alone makes some devices act, and waits for the other end of a pipe.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a NUL names no file either
        return "there is no such file"
    if stat.S_ISDIR(mode):
        return f"is a directory; give one {what}"
    return "" if stat.S_ISREG(mode) else f"is not an ordinary file; give a {what}"


def _part(file: FileIO, most: int) -> bytes:
    """Read at most so many bytes; raises BlockingIOError where there are none yet, as in ``/proc/kmsg``."""
    part: bytes | None = file.read(most)
    if part is None:
        raise BlockingIOError
    return part


def shortened(path: Path) -> str:
    """Return what messages call a path: itself in one line, or its beginning if it is very long."""
    name = str(path) if str(path).isprintable() else repr(str(path))[1:-1]
    return name if len(name) <= _LONGEST_PATH else f"{name[:_LONGEST_PATH]}..."


def _begin(path: Path, option: str) -> str:
    name = shortened(path)
    return f"{option}: {name}:" if option else f"{name}:"
