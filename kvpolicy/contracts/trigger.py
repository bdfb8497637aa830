"""When a row is compacted: the contract of triggers, and all that they may know. No torch here, see `component`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from kvpolicy.contracts.component import Component


@dataclass(frozen=True)
class Counters:
    """One row's counters, plain integers.

    Attributes:
        resident: entries held per KV head now.
        budget: entries to hold after a compaction.
        incoming: tokens about to be appended (1 in decoding).
        seen: tokens seen so far.
        prompt: tokens of the prompt.
    """

    resident: int
    budget: int
    incoming: int
    seen: int
    prompt: int


class Trigger(Component):
    """Says when a row is compacted; a pure function of the row's counters."""

    @abstractmethod
    def fires(self, counters: Counters) -> bool:
        """Return True when the row must be compacted before `counters.incoming` more entries are appended."""

    @abstractmethod
    def buffer(self) -> int:
        """Entries per head that may stand above the budget between two compactions, at least 1."""
