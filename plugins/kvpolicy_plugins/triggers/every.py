"""Compact in steps."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from kvpolicy.contracts.trigger import Counters, Trigger


class Every(Trigger):
    """Fires when the buffer above the budget is full, so that a compaction evicts at least `interval` entries.

    The interval is a first-order knob of accuracy, not only of cost: report it with the budget.
    """

    shorthand: ClassVar[str | None] = "interval"
    paper: ClassVar[str] = "arXiv:2505.24133"

    interval: int = Field(default=128, ge=1)
    """Entries that gather above the budget before a compaction (R-KV's buffer)."""
    align: int = Field(default=1, ge=1)
    """Put the moment off until the tokens seen are a multiple of this, for engines with pages."""

    def fires(self, counters: Counters) -> bool:
        after = counters.resident + counters.incoming
        if counters.resident <= counters.budget or after <= counters.budget + max(self.interval, counters.incoming):
            return False
        # A chunk of the prompt may leave no room to wait for the multiple.
        no_room = after > counters.budget + max(self.buffer(), counters.incoming)
        return no_room or counters.seen % self.align == 0

    def buffer(self) -> int:
        return self.interval + self.align - 1
