"""Compact at every step."""

from __future__ import annotations

from kvpolicy.contracts.trigger import Counters, Trigger


class EachStep(Trigger):
    """Fires whenever more than the budget is held: one entry goes for each one that comes."""

    def fires(self, counters: Counters) -> bool:
        return counters.resident > counters.budget

    def buffer(self) -> int:
        return 1
