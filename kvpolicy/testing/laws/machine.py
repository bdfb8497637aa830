"""The stateful law: any sequence of cache operations, against a model in Python lists."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvpolicy.policy.policy import Policy
from kvpolicy.testing.laws._base import law
from kvpolicy.testing.laws._book import Book, Step, longest_prompt
from kvpolicy.testing.laws.engine import evicts

_COUNTS = st.lists(st.integers(0, 2), min_size=3, max_size=3).map(tuple)


def cache_machine(policy: Policy) -> type[RuleBasedStateMachine]:  # noqa: C901  # one method for each operation
    """Return a state machine that drives `policy`; its list `steps` repeats a run without hypothesis."""
    some_prompts = st.lists(st.integers(1, longest_prompt(policy)), min_size=1, max_size=3).map(tuple)

    class CacheMachine(RuleBasedStateMachine):
        """Appends, evicts, reorders, crops, forks and resets.

        Class attributes:
            runs: how many have ended.
            decided: how many of them evicted something, if the policy ever does.
        """

        runs = decided = 0

        def __init__(self) -> None:
            super().__init__()
            self.book = Book(policy)
            self.steps: list[Step] = []
            _latest[:] = [self.steps]

        def _do(self, *step: Any) -> None:
            self.steps.append(step)
            self.book.apply(step)

        def teardown(self) -> None:
            """Count the run."""
            CacheMachine.runs += 1
            CacheMachine.decided += bool(self.book.evictions) or not evicts(policy)

        @initialize(
            prompts=some_prompts, tagged=st.booleans(), room=st.sampled_from([0, 0, 0, 24]), times=st.integers(0, 32)
        )
        def start(self, prompts: tuple[int, ...], *, tagged: bool, room: int, times: int) -> None:
            """Read prompts into an empty cache, and decode."""
            self._do("make", tagged, room)
            self._do("append", prompts)
            self._do("decode", times)

        @rule(counts=_COUNTS, times=st.integers(1, 5))
        def append(self, counts: tuple[int, ...], times: int) -> None:
            """Append up to two tokens per row, some rows padded, and again."""
            for _ in range(times):
                self._do("append", counts)

        @rule(times=st.integers(1, 16))
        def decode(self, times: int) -> None:
            """Append one token to every row, and again."""
            self._do("decode", times)

        @rule(index=st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple), observed=st.booleans())
        def rows(self, index: tuple[int, ...], *, observed: bool) -> None:
            """Reorder, repeat or select rows, sometimes right after attention has been observed."""
            if observed:
                self._do("observe")
            self._do("rows", index)

        @rule(columns=st.sampled_from([1, 2, 3, 1, 2, 3, 5, 10, 24]))
        def crop(self, columns: int) -> None:
            """Take columns back."""
            self._do("crop", columns)

        @rule()
        def fork(self) -> None:
            """Continue on a copy."""
            self._do("fork")

        @rule()
        def settle(self) -> None:
            """Compact what is due."""
            self._do("settle")

        @rule()
        def observe(self) -> None:
            """Feed waiting queries to the scorers that accumulate attention."""
            self._do("observe")

        @precondition(lambda self: self.book.evictions > 0)
        @rule(prompts=some_prompts, times=st.integers(0, 16))
        def reset(self, prompts: tuple[int, ...], times: int) -> None:
            """Forget everything, read other prompts and decode."""
            self._do("reset")
            self._do("append", prompts)
            self._do("decode", times)

    return CacheMachine


_latest: list[list[Step]] = []


def latest_steps() -> list[Step]:
    """Return the steps of the machine that was made last."""
    return list(_latest[0]) if _latest else []


@law(
    "Scores that stay behind when their entries move rank the wrong entries from then on.",
    ("policy",),
    machine=cache_machine,
    effort=0.6,
)
def state_moves_with_slots(subject: Policy, steps: list[Step]) -> None:
    """Keys, values, positions, queries and slot state stay together through any sequence of cache operations.

    Appends (with padding), evictions, reordering of rows, crops, forks and resets, against a model of Python lists:
    what a head holds is a sorted part of what it held before plus what came, each entry with its own key, value and
    state.
    """
    book = Book(subject)
    for step in steps:
        book.apply(step)
