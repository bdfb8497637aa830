"""Exceptions. Every message is one sentence: the place, what is wrong, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Self

from kvpolicy.odd_text import harmless


class KVPolicyError(Exception):
    """Base of all errors that kvpolicy raises on purpose.

    A message may quote a file, a path or another library: what a terminal would obey in it is written out.
    """

    # Here and not where it is made: exceptions are raised while a step is traced into a graph, too.
    def __str__(self) -> str:
        return harmless(super().__str__())


class SpecError(KVPolicyError, ValueError):
    """A policy file or specification is not valid; the message names file and line, or the field.

    Attributes:
        problems: all that is wrong, a sentence each; the message is the first of them and says how many follow.
    """

    def __init__(self, message: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(map(harmless, problems or (message,)))

    @classmethod
    def of(cls, problems: Sequence[str]) -> Self:
        """Return the error for one or more problems."""
        first, more = problems[0], len(problems) - 1
        return cls(
            first + (f" ({more} more problem{'s' if more > 1 else ''} after this one.)" if more else ""), problems
        )


class UnknownComponentError(SpecError):
    """A specification names a component or policy that is not registered."""


class TableError(KVPolicyError, ValueError):
    """A calibration table is missing, damaged, says nothing, or is of another model."""


class PluginError(KVPolicyError):
    """A plugin could not be imported or registered something that is not allowed."""


class BudgetError(KVPolicyError, ValueError):
    """A budget cannot be met, for example because more entries are protected than it holds."""


class ComponentError(KVPolicyError, ValueError):
    """A component returned what its contract does not allow, or wrote to what it was given."""


class ScoreError(ComponentError):
    """A component returned scores of the wrong shape, dtype or device, or scores that are not finite."""


class UnsupportedError(KVPolicyError):
    """A model, cache or combination of components that a runtime cannot serve."""


class CacheStateError(KVPolicyError, RuntimeError):
    """A cache was asked for something its present state does not allow."""


class UnreachableError(KVPolicyError):
    """A model or a data set of the hub cannot be had: there is no network, nothing of that name, or no access to it."""


class FormerNameWarning(FutureWarning):
    """A policy file uses a former name, which is read until the next major version."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the one of `known` that looks most like a word, None when none looks like it."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest of `known`, or an empty string when nothing is near."""
    near = nearest(word, known)
    return "" if near is None else f" Did you mean {near!r}?"
