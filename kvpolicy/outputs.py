"""Files that are written for users: all of a file or none of it, and never through a link."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from kvpolicy.errors import KVPolicyError


def replace_file(
    path: Path, content: str | bytes, option: str = "", error: type[KVPolicyError] = KVPolicyError
) -> None:
    """Write a file, or leave what was there.

    The content goes into a new file of the same folder, reaches the disk, and takes the place of the old one in one
    step: at no time is there half a file, and a reader of the old one keeps it. The permissions of an old file stay.

    Args:
        path: the file; its folder has to be there.
        content: all of it; text is written as UTF-8.
        option: what errors begin with, such as ``--out``.
        error: what to raise.

    Raises:
        KVPolicyError: the path is a link, a folder or a device, or cannot be written.
    """
    begin = f"{option}: {path}" if option else str(path)
    raw = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        mode = _mode_of(path)
    except OSError as problem:
        raise error(f"{begin} cannot be written ({problem.strerror}); name another file.") from None
    if mode is not None and not stat.S_ISREG(mode):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise error(f"{begin} is {what}; name an ordinary file.")
    beside = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
    try:
        _write(beside, raw, None if mode is None else stat.S_IMODE(mode))
        beside.replace(path)
        _sync_folder(path.absolute().parent)
    except OSError as problem:
        raise error(f"{begin} cannot be written ({problem.strerror}); name another file.") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _mode_of(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return None


def _write(path: Path, raw: bytes, permissions: int | None) -> None:
    # Made here and now or not at all: whatever waits under that name is not written to.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with os.fdopen(descriptor, "wb") as file:
        if permissions is not None and hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), permissions)
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
