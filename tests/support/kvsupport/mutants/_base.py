"""What a mutant is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Mutant:
    """Something broken on purpose.

    Attributes:
        name: what is wrong with it.
        seen_in: where such a bug was found, or which rule it breaks.
        subject: what is checked: a component class, the name of a policy, or a function that returns a specification.
        laws: only these are tried, for what differs from run to run; all if empty.
        breaking: context in which the core itself is broken.
    """

    name: str
    seen_in: str
    subject: Any
    breaking: Callable[[], AbstractContextManager[Any]] = nullcontext
    laws: tuple[str, ...] = ()


def patched(*changes: tuple[Any, str, Any]) -> Callable[[], AbstractContextManager[Any]]:
    """Return a context that replaces attributes: (owner, name, new value)."""

    @contextmanager
    def block() -> Iterator[None]:
        patches = [mock.patch.object(owner, name, new) for owner, name, new in changes]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.stop()

    return block
