"""How many rows fit into a memory, with the whole cache and under a policy, and what a step then costs at the least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvpolicy.cache.engine import UNOBSERVED_MOST
from kvpolicy.cache.queries.log import ROLLBACK
from kvpolicy.cache.store.ragged import BLOCK
from kvpolicy.cli.memory import DTYPES, Course, ModelShape, simulate
from kvpolicy.cli.modelsize import ModelSize
from kvpolicy.policy.policy import Policy

_MOST_ROWS: Final = 1 << 30


@dataclass(frozen=True)
class Machine:
    """What a device can do at most.

    Attributes:
        name: for people.
        cache: bytes that are left for caches.
        bandwidth: bytes per second from its memory; None where nobody said, and then speeds are ratios only.
        arithmetic: floating-point operations per second, likewise.
    """

    name: str
    cache: int
    bandwidth: float | None = None
    arithmetic: float | None = None


@dataclass(frozen=True)
class RowNeeds:
    """What one row takes under a policy, or without one.

    Attributes:
        course: its entries while the text grows.
        keys_values: bytes of the keys and values that are held at the peak.
        allocated: bytes of the tensors that hold them, at most, in transformers.
        beside: bytes of positions, slot state and queries, at most.
        state: bytes of windows and states that no policy touches.
    """

    course: Course
    keys_values: int
    allocated: int
    beside: int
    state: int

    @property
    def total(self) -> int:
        """Bytes of a row, at most."""
        return self.allocated + self.beside + self.state


def whole_row(policy: Policy, shape: ModelShape, size: ModelSize, length: int, prompt: int) -> RowNeeds:
    """Return what a row of so many tokens takes without eviction; `policy` is `full`."""
    course = simulate(policy, length, prompt)
    held = course.peak * shape.bytes_per_token
    return RowNeeds(course, held, held, 0, size.state or 0)


def row_under(policy: Policy, shape: ModelShape, size: ModelSize, length: int, prompt: int) -> RowNeeds:
    """Return what a row of so many tokens takes under a policy, at the worst of how it may split its budget.

    Args:
        policy: the policy.
        shape: heads of the layers that it works on.
        size: of the rest of the model.
        length: tokens seen at the end.
        prompt: those of them that are the prompt.

    Raises:
        BudgetError: more is protected than the budget holds.
    """
    course = simulate(policy, length, prompt)
    heads = sum(layers * count for layers, count, _ in shape.groups)
    each = shape.bytes_per_token
    if policy.counts != "equal":  # all that the budget gives may fall to the layers with the largest heads
        each = heads * max(2 * dim for _, _, dim in shape.groups) * DTYPES[shape.dtype][1]
    slots = _slots(policy, course, prompt)
    notes = 4 + sum(state.dtype.itemsize for state in policy.slot_states)
    notes += 4 if policy.traits.re_rotates else 0
    beside = slots * heads * notes
    if policy.counts != "equal":
        beside += heads * (8 + 16 * -(-slots // BLOCK))  # whose each block is, and how many entries it has
    feeds = "attention" in policy.needs
    if policy.observed_queries or feeds:
        columns = policy.observed_queries + ROLLBACK + (UNOBSERVED_MOST if feeds else 0)
        widest = max(dim for _, _, dim in shape.groups)
        layers = sum(count for count, _, _ in shape.groups)
        beside += columns * layers * size.query_heads * widest * DTYPES[shape.dtype][1]
    return RowNeeds(course, course.peak * each, slots * each, beside, size.state or 0)


def _slots(policy: Policy, course: Course, prompt: int) -> int:
    """Return the slots per head that transformers' runtime allocates at most: arenas grow by half, up to a bound."""
    if policy.counts != "equal" and course.compactions:
        # Blocks behind a compaction, and a tail in blocks; before it an arena, for the prompt or up to the bound.
        first = max(prompt, policy.bound or 0) if policy.bound is not None else prompt + max(prompt // 2, 64)
        return max(first + 1, course.peak + 2 * BLOCK)
    if policy.bound is None:
        return course.peak + max(course.peak // 2, 64)
    return max(policy.bound, prompt + 1 if prompt > policy.bound else 0)


def rows_that_fit(needs: RowNeeds, machine: Machine) -> int:
    """Return how many rows fit, all at their largest."""
    return min(machine.cache // max(needs.total, 1), _MOST_ROWS)


@dataclass(frozen=True)
class Roofline:
    """The least time of decode steps: what they must read and compute, one hiding behind the other.

    Args:
        machine: its bandwidth and arithmetic.
        shape: heads of the layers that a policy works on.
        size: of the rest of the model.
    """

    machine: Machine
    shape: ModelShape
    size: ModelSize

    def step(self, rows: int, needs: RowNeeds) -> float:
        """Return the seconds of one step of so many rows, at the mean of what they hold."""
        return max(self._moved(rows, needs), self._computed(rows, needs))

    def _moved(self, rows: int, needs: RowNeeds) -> float:
        entries = needs.course.mean * self.shape.bytes_per_token + needs.state
        return (self.size.read(rows) + rows * entries) / (self.machine.bandwidth or 1.0)

    def _computed(self, rows: int, needs: RowNeeds) -> float:
        if self.machine.arithmetic is None:
            return 0.0
        layers = sum(layers * dim for layers, _, dim in self.shape.groups)
        attention = 4 * self.size.query_heads * layers * needs.course.mean
        return rows * (self.size.products + attention) / self.machine.arithmetic

    def tokens_per_second(self, rows: int, needs: RowNeeds, prompt: int) -> float:
        """Return the most tokens per second of so many rows; compactions read all keys once and move what stays."""
        steps = needs.course.seen - prompt
        each = self.shape.bytes_per_token
        compaction = needs.course.peak * each / 2 + 2 * needs.course.resident * each
        spent = needs.course.compactions * rows * compaction / (self.machine.bandwidth or 1.0)
        return rows * steps / (steps * self.step(rows, needs) + spent)

    def bound_by_arithmetic(self, needs: RowNeeds) -> int | None:
        """Return from how many rows on a step is bound by arithmetic, so that more rows gain nothing; None if never."""
        low, high = 1, _MOST_ROWS
        if self._computed(high, needs) <= self._moved(high, needs):
            return None
        while low < high:
            middle = (low + high) // 2
            if self._computed(middle, needs) > self._moved(middle, needs):
                high = middle
            else:
                low = middle + 1
        return low
