"""What a law is, and the register of all laws."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvpolicy.testing._extra import require_hypothesis

require_hypothesis()

from hypothesis.strategies import SearchStrategy  # noqa: E402

from kvpolicy.contracts.components import KINDS, Component  # noqa: E402

LAW_KINDS = (*KINDS, "policy")
"""What a law can be about: a kind of component, or a whole policy."""
SEES_VIEW = ("importance", "redundancy", "mixer", "protection", "selector", "post", "policy")
"""Kinds whose result belongs to the slots of a view."""


class LawBrokenError(AssertionError):
    """A subject does not obey a law; the message says what it did instead."""


class UndecidedError(Exception):
    """This example says nothing about the law; the message says why, to be counted."""


def decided(says: object, why: str) -> None:
    """Raise UndecidedError unless an example says something."""
    if not says:
        raise UndecidedError(why)


@dataclass(frozen=True)
class Law:
    """A named property of components or policies.

    Attributes:
        name: how components name it in `laws_not_applicable`.
        reason: why it matters, in one line.
        kinds: what it is about, out of `LAW_KINDS`.
        statement: ``statement(subject, **drawn)`` raises LawBrokenError where the law does not hold; its docstring is
            the law in words.
        draws: subject -> strategy of the keyword arguments of `statement`.
        unless: subject -> why the law says nothing about it, or None.
        effort: share of a profile's examples; 0 for a statement that has nothing to draw and is checked once.
        machine: subject -> a `RuleBasedStateMachine` whose steps `statement` can repeat, instead of `draws`.
    """

    name: str
    reason: str
    kinds: tuple[str, ...]
    statement: Callable[..., None]
    draws: Callable[[Any], SearchStrategy[dict[str, Any]]] | None = None
    unless: Callable[[Any], str | None] | None = None
    effort: float = 1.0
    machine: Callable[[Any], type[Any]] | None = None

    @property
    def text(self) -> str:
        """The law in words, from the docstring of its statement."""
        return inspect.getdoc(self.statement) or ""

    @property
    def theme(self) -> str:
        """The module that the law stands in."""
        return self.statement.__module__.rsplit(".", 1)[-1]

    def holds(self, subject: Any, **drawn: Any) -> None:
        """Check the law on given data; raises LawBrokenError where it does not hold."""
        try:
            self.statement(subject, **drawn)
        except UndecidedError:
            return


LAWS: dict[str, Law] = {}
"""All laws by name, in the order in which they are checked and documented."""


def law(
    reason: str,
    kinds: tuple[str, ...],
    draws: Callable[[Any], SearchStrategy[dict[str, Any]]] | None = None,
    *,
    unless: Callable[[Any], str | None] | None = None,
    effort: float = 1.0,
    machine: Callable[[Any], type[Any]] | None = None,
) -> Callable[[Callable[..., None]], Law]:
    """Make a law of a function ``(subject, **drawn)`` and register it under the function's name."""

    def register(statement: Callable[..., None]) -> Law:
        made = Law(statement.__name__, reason, kinds, statement, draws, unless, effort, machine)
        LAWS[made.name] = made
        return made

    return register


def broken(message: str) -> LawBrokenError:
    """Return the exception to raise."""
    return LawBrokenError(message)


def exceptions_of(subject: Any) -> Mapping[str, str]:
    """Return the laws that a component, or a component of a policy or of it, declares not to obey, with its reasons."""
    parts = getattr(subject, "components", None)
    if parts is None:
        own, *held = subject.members()
        return {**_told(held), **own.laws_excused()}
    return _told(parts)


def _told(parts: Iterable[Component]) -> dict[str, str]:
    return {name: f"{type(c).__name__}: {why}" for c in parts for name, why in c.laws_excused().items()}
