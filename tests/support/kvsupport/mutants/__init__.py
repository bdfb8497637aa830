"""Components and cores that are broken on purpose, and which laws notice.

The bugs are those that were found in released eviction code; each of them must be caught by a law. `table` is what
`docs/mutations.md` shows; `scripts/mutate.py` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

from kvpolicy.testing.checking import ProfileName, check, subject_of
from kvpolicy.testing.laws import LAWS, Law
from kvsupport.mutants import core, parts, scorers
from kvsupport.mutants._base import Mutant

__all__ = ["MUTANTS", "Caught", "Mutant", "run", "table"]

_MISTAKE = re.compile("(Type|Attribute|Name)Error: ")

MUTANTS: tuple[Mutant, ...] = (*scorers.MUTANTS, *parts.MUTANTS, *core.MUTANTS)
"""All mutants, components first."""


@dataclass(frozen=True)
class Caught:
    """A mutant and the laws that it breaks."""

    mutant: Mutant
    kind: str
    laws: tuple[str, ...]


def run(mutant: Mutant, laws: list[Law] | None = None, profile: ProfileName = "quick") -> Caught:
    """Check a mutant against all laws or some, without looking for the smallest example."""
    subject = subject_of(mutant.subject() if isinstance(mutant.subject, FunctionType) else mutant.subject)
    if laws is None and mutant.laws:
        laws = [LAWS[name] for name in mutant.laws]
    with mutant.breaking():
        results = check(subject, profile, laws=laws, shrink=False)
    # What a mutant does by mistake is no bug that a law has found.
    strange = [r.failure.message for r in results if r.failure is not None and _MISTAKE.match(r.failure.message)]
    assert not strange, f"the mutant {mutant.name!r} does not fit the code that it breaks: {strange[0]}"
    kind = f"core, under `{subject.name}`" if subject.kind == "policy" else subject.kind
    return Caught(mutant, kind, tuple(r.law for r in results if r.status == "failed"))


def table(done: Callable[[Caught], None] | None = None) -> list[Caught]:
    """Run all mutants."""
    rows = []
    for mutant in MUTANTS:
        rows.append(run(mutant))
        if done is not None:
            done(rows[-1])
    return rows
