"""What the oracle keeps of each row, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvpolicy import ops

TOLERANCE = 1e-6
"""Gap of scores (relative to scores above 1), or distance of a cosine to its threshold, that fp32 need not resolve."""


def near_tie(scores: Sequence[float], place: int) -> bool:
    """Say whether rounding may decide which of some scores are the `place` highest.

    Scores around the cut that are equal but for rounding, with room around them, are no near tie: position decides.

    Args:
        scores: of what competes, in any order.
        place: how many of them stay.
    """
    if not 0 < place < len(scores):
        return False
    ordered = sorted(scores, reverse=True)
    above, below = ordered[place - 1], ordered[place]
    if above - below >= TOLERANCE * max(1.0, abs(above), abs(below)):
        return False
    rounding = ops.ROUNDING * max(abs(above), abs(below))
    first, last = place - 1, place
    while first > 0 and ordered[first - 1] - ordered[first] <= rounding:
        first -= 1
    while last + 1 < len(ordered) and ordered[last] - ordered[last + 1] <= rounding:
        last += 1
    edges = [ordered[n - 1] - ordered[n] for n in (first, last + 1) if 0 < n < len(ordered)]
    return ordered[first] - ordered[last] > rounding / 2 or min(edges, default=math.inf) < 1.5 * rounding


Sets = list[list[int]]
"""Positions by head."""


@dataclass
class OracleReport:
    """What a comparison found.

    Attributes:
        decisions: how many times a head was compacted.
        evictions: entries that these compactions dropped.
        mismatches: places where the recorded cache holds something else than the oracle says.
        accepted: likewise, but the scores at the cut, or a cosine and its threshold, are closer than `TOLERANCE`.
        near_ties: decisions that fp32 need not get right, by the float64 scores alone: see `near_tie`.
        slack: largest difference of scores among the accepted ones.
        output_error: largest absolute difference of recorded and recomputed attention outputs.
    """

    decisions: int = 0
    evictions: int = 0
    mismatches: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    near_ties: int = 0
    slack: float = 0.0
    output_error: float = 0.0

    @property
    def ok(self) -> bool:
        """Nothing differs that may not differ."""
        return not self.mismatches

    def __str__(self) -> str:
        more = f"; first: {self.mismatches[0]}" if self.mismatches else ""
        return (
            f"{self.decisions} decisions, {self.evictions} evictions, {len(self.mismatches)} mismatches, "
            f"{len(self.accepted)} accepted of {self.near_ties} near ties (slack {self.slack:.1e}), "
            f"output error {self.output_error:.1e}{more}"
        )


@dataclass
class OracleRow:
    """One row. Lists are indexed by position, `held` and the like by layer and head."""

    keys: dict[int, list[Tensor]]
    values: dict[int, list[Tensor]]
    queries: dict[int, list[Tensor]]
    hidden: dict[int, list[Tensor]]
    held: dict[int, Sets]
    turned: dict[int, list[dict[int, int]]]
    memory: dict[int, list[dict[str, dict[int, float]]]]
    columns: list[bool] = field(default_factory=list)
    prompt: int = 0
    compactions: int = 0
    observed: int = 0
    shift: int = 0
    decoded: bool = False

    @property
    def seen(self) -> int:
        """Tokens of the row so far."""
        return sum(self.columns)

    @staticmethod
    def empty(heads: dict[int, int]) -> OracleRow:
        """Return a row that has seen nothing; `heads` says how many each layer has."""
        return OracleRow(
            keys={i: [] for i in heads},
            values={i: [] for i in heads},
            queries={i: [] for i in heads},
            hidden={i: [] for i in heads},
            held={i: [[] for _ in range(count)] for i, count in heads.items()},
            turned={i: [{} for _ in range(count)] for i, count in heads.items()},
            memory={i: [{} for _ in range(count)] for i, count in heads.items()},
        )

    def copy(self) -> OracleRow:
        """Return a row that changes apart from this one; tensors are shared."""

        def each(table: dict[int, Any]) -> dict[int, Any]:
            return {layer: [x if isinstance(x, Tensor) else x.copy() for x in row] for layer, row in table.items()}

        return OracleRow(
            each(self.keys), each(self.values), each(self.queries), each(self.hidden), each(self.held),
            each(self.turned), each(self.memory), list(self.columns), self.prompt, self.compactions, self.observed,
            self.shift, self.decoded,
        )  # fmt: skip
