"""Characters that do something instead of showing something: what they are, and how to print them harmlessly."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

_BIDI: Final = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
# Line breaks and tabs are layout; all other control characters may be obeyed by a terminal.
_ODD: Final = re.compile(rf"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff{_BIDI}]")
_NAMES: Final = {"\0": "NUL", "\x1b": "an escape", "\x07": "a bell", "\x08": "a backspace", "\x7f": "a delete"}


def odd_character(text: str) -> str | None:
    """Return what the first character of a text is that must not stand in it; None if there is none.

    Refused are control characters other than tab and line breaks, halves of surrogate pairs, and the characters that
    turn the direction of text: a terminal obeys them, and what one reads is not what is there.
    """
    found = _ODD.search(text)
    if found is None:
        return None
    character = found[0]
    if "\ud800" <= character <= "\udfff":
        what = "half of a surrogate pair"
    elif character in _NAMES:
        what = _NAMES[character]
    elif unicodedata.category(character) == "Cf":
        what = "a character that turns the direction of text"
    else:
        what = "a control character"
    return f"U+{ord(character):04X}, {what}"


def harmless(text: str) -> str:
    """Return a text in which odd characters are written out: an escape as a backslash and ``x1b``."""
    return _ODD.sub(lambda found: _written(ord(found[0])), text)


def _written(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
