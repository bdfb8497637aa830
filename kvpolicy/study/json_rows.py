"""Rows of JSON Lines whose fields need not be of one type, read one by one: files of benchmarks are large."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from kvpolicy.errors import KVPolicyError

_LONGEST_LINE = 64 << 20
"""Bytes of a row; the longest published ones, whole books, have a tenth of it."""


class JsonRows:
    """The rows of a file, each an object; a JSON file that is one list is read too.

    Args:
        file: what is read.
        where: what errors call it.

    Raises:
        KVPolicyError: what is read is not JSON, a row is no object, or there is none; the message names the line.
    """

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file = file
        self._where = where
        self._rows: list[Any] | None = None
        self._lines: list[tuple[int, int]] = []  # (offset, number of the line)
        try:
            self._open()
        except BaseException:
            file.close()
            raise

    @classmethod
    def of_file(cls, path: str) -> Self:
        """Open a file that is there."""
        return cls(Path(path).open("rb"), path)

    @classmethod
    def of_archive(cls, path: str, name: str) -> Self:
        """Open a file of a ZIP archive, in whatever folder of it; raises KVPolicyError."""
        try:
            with zipfile.ZipFile(path) as archive:
                member = next((each for each in archive.namelist() if Path(each).name == name), None)
                if member is None:
                    raise KVPolicyError(f"datasets: {path} has no file {name}; name a local copy as `path`.")
                return cls(io.BytesIO(archive.read(member)), f"{path}, {member}")
        except (zipfile.BadZipFile, OSError) as error:
            raise KVPolicyError(f"datasets: {path} cannot be read: {error}; name a local copy as `path`.") from error

    def _open(self) -> None:
        offset = 0
        lines = iter(lambda: self._file.readline(_LONGEST_LINE + 1), b"")
        for number, line in enumerate(lines, 1):
            if line.strip():
                if not self._lines and line.lstrip().startswith(b"["):  # however long
                    self._file.seek(0)
                    self._rows = self._parsed(self._file.read(), self._where)
                    if not isinstance(self._rows, list):
                        raise KVPolicyError(f"datasets: {self._where} is no list of rows; name JSON Lines.")
                    break
                if len(line) > _LONGEST_LINE:
                    raise KVPolicyError(
                        f"datasets: {self._where}:{number} is longer than any published row; name a file of JSON Lines."
                    )
                self._lines.append((offset, number))
            offset += len(line)
        if not len(self):
            raise KVPolicyError(f"datasets: {self._where} has no row in it; name another file.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._lines) if self._rows is None else len(self._rows)

    def place(self, row: int) -> str:
        """Return where a row stands, for errors."""
        return f"{self._where}:{self._lines[row][1]}" if self._rows is None else f"{self._where}, row {row + 1}"

    def fields(self, row: int) -> Mapping[str, Any]:
        """Return a row; raises KVPolicyError."""
        if self._rows is None:
            self._file.seek(self._lines[row][0])
            found = self._parsed(self._file.readline(), self.place(row))
        else:
            found = self._rows[row]
        if not isinstance(found, dict):
            raise KVPolicyError(f"datasets: {self.place(row)} is no object with fields; name JSON Lines of objects.")
        return found

    @staticmethod
    def _parsed(text: bytes, place: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = str(error).partition(": line")[0]
            raise KVPolicyError(f"datasets: {place} is not JSON ({reason}); name a file of JSON Lines.") from None
