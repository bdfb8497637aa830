"""A specification without a mistake."""

from __future__ import annotations

import re
from typing import Any

import pytest

import kvpolicy
from kvpolicy import PolicySpec, SpecError

GOOD = """\
schema_version: 1
policy: p
budget: {tokens: 64}
trigger: {every: 16}
protect: {sinks: 4, recent: 8}
importance:
  use: window_attention
  observe: 8
redundancy: key_cosine
mixer: {use: linear, weight: 0.1}
"""


def error_of(text: str, source: str = "p.yaml", **fields: Any) -> str:
    """The sentence with which a specification is refused."""
    with pytest.raises(SpecError) as caught:
        PolicySpec.from_yaml(text, source, **fields)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?", ")"))
    return message


def expect_mistake(old: str, new: str, message: str) -> None:
    """Replace a text that `GOOD` has once; `message` is the whole sentence, ``<kind>`` all names of a kind."""
    assert GOOD.count(old) == 1, old
    found = error_of(GOOD.replace(old, new))
    message = re.sub(r"<(\w+)>", lambda kind: ", ".join(kvpolicy.catalog().names(kind[1])), message)
    if message.endswith("'rkv'?"):
        assert found.startswith(message)
    else:
        assert found == message
