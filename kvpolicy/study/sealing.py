"""Rows of a results file: a checksum for each, and what is in them read within bounds.

A checksum says that a row is as it was written; it is no signature, so what a row holds is checked as well.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

MOST_BYTES: Final = 1 << 26
"""Most bytes of one value in the file, and of one that is unpacked."""
MOST_TEXT: Final = 1 << 20
"""Most bytes of one JSON text: settings, metrics, a policy in full."""

Scalar = str | bytes | int | float | None


class DamagedError(Exception):
    """A value is not what was written, or not what may be written; the message completes ``is damaged: ``."""


def seal(table: str, values: Sequence[Scalar]) -> bytes:
    """Return the checksum of a row, 16 bytes: of the table's name and every value with its type and length."""
    digest = hashlib.blake2b(table.encode(), digest_size=16)
    for value in values:
        if isinstance(value, float):
            kind, data = b"f", struct.pack("<d", value)
        elif isinstance(value, bytes):
            kind, data = b"b", value
        elif isinstance(value, str):
            kind, data = b"s", value.encode("utf-8", "surrogatepass")
        else:
            kind, data = b"n", str(value).encode()
        digest.update(kind + struct.pack("<q", len(data)) + data)
    return digest.digest()


def check(table: str, values: Sequence[Scalar], checksum: object) -> None:
    """Raise DamagedError if a row is not as it was written."""
    if checksum != seal(table, values):
        raise DamagedError(f"a row of its table `{table}` is not as it was written")


def pack(text: str) -> bytes:
    """Return a text compressed."""
    return zlib.compress(text.encode(), 6)


def unpack(data: bytes, most: int = MOST_BYTES) -> str:
    """Return what `pack` was given; raises DamagedError, also when it would be longer than `most` bytes."""
    reader = zlib.decompressobj()
    try:
        raw = reader.decompress(data, most + 1)
        if len(raw) > most:
            raise DamagedError(f"a compressed text in it has more than {most >> 20} MiB")
        if not reader.eof or reader.unused_data:
            raise DamagedError("a compressed text in it is not whole")
        return raw.decode()
    except (zlib.error, UnicodeDecodeError):
        raise DamagedError("a compressed text in it cannot be read") from None


def read_json(shape: TypeAdapter[Any], text: str, what: str, most: int = MOST_TEXT) -> Any:
    """Return what a JSON text says, checked against its shape; raises DamagedError, naming `what` it is.

    Args:
        shape: what it has to be, strictly.
        text: the text.
        what: for the message.
        most: most characters that it may have.
    """
    if not isinstance(text, str) or len(text) > most:
        raise DamagedError(f"{what} in it is longer than {most >> 10} KiB, or no text")
    try:
        return shape.validate_json(text, strict=True)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in detail["loc"])[:60]
        raise DamagedError(
            f"{what} in it is not what is written there ({place or 'at the top'}: {detail['msg']})"
        ) from None
