"""Where names stand in a plot, so that none covers another one."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass


def wrapped(name: str, width: int, lines: int = 2) -> list[str]:
    """Return a name in lines of at most `width` characters; it may be broken after "=" too."""
    found = textwrap.wrap(name.replace("=", "= "), width, max_lines=lines, placeholder=" …")
    return [line.replace("= ", "=") for line in found] or [name]


def spread(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Return places on a line as near as can be to those that are wanted, so that nothing overlaps.

    Args:
        wanted: where the middle of each label would best be.
        sizes: how much room each takes.
        low, high: ends of the line; what does not fit in between reaches beyond `low`.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[tuple[list[int], float]] = []  # labels side by side, and where the first one begins
    for i in order:
        members, start = [i], wanted[i] - sizes[i] / 2
        while groups and groups[-1][1] + sum(sizes[j] for j in groups[-1][0]) > start:
            before = groups.pop()[0]
            members = [*before, *members]
            start = _start(members, wanted, sizes)
        start = min(max(start, low), max(low, high - sum(sizes[j] for j in members)))
        while groups and groups[-1][1] + sum(sizes[j] for j in groups[-1][0]) > start:
            members = [*groups.pop()[0], *members]
            start = min(_start(members, wanted, sizes), high - sum(sizes[j] for j in members))
        groups.append((members, start))
    places = [0.0] * len(wanted)
    for members, start in groups:
        ends = itertools.accumulate((sizes[i] for i in members), initial=start)
        for i, begin in zip(members, ends, strict=False):
            places[i] = begin + sizes[i] / 2
    return places


def _start(members: Sequence[int], wanted: Sequence[float], sizes: Sequence[float]) -> float:
    """Return where labels side by side begin, so that they are on average where they are wanted."""
    before, sum_of_starts = 0.0, 0.0
    for i in members:
        sum_of_starts += wanted[i] - sizes[i] / 2 - before
        before += sizes[i]
    return sum_of_starts / len(members)


@dataclass(frozen=True)
class Box:
    """A rectangle: left, bottom, right, top."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Return the area that both cover."""
        across = min(self.right, other.right) - max(self.left, other.left)
        up = min(self.top, other.top) - max(self.bottom, other.bottom)
        return across * up if across > 0 and up > 0 else 0.0


def beside_points(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    inside: Box,
    taken: Sequence[Box] = (),
) -> list[tuple[float, float]]:
    """Return where the middle of each label stands: near its point, over as little of anything else as can be.

    Args:
        points: what is labelled.
        sizes: width and height of each label.
        inside: where labels may stand.
        taken: what they should not cover, such as other points.
    """
    covered = list(taken)
    found = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        best: tuple[float, Box] | None = None
        for ring in range(1, 7):
            for turn in range(12):
                angle = math.pi * (turn / 6 + 1 / 12)
                middle_x = x + math.cos(angle) * (width / 2 + 7 * ring)
                middle_y = y + math.sin(angle) * (height / 2 + 7 * ring)
                box = Box(middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2)
                outside = width * height - box.overlap(inside)
                cost = 4 * outside + sum(box.overlap(other) for other in covered) + 0.02 * width * height * ring
                if best is None or cost < best[0]:
                    best = cost, box
        assert best is not None
        box = best[1]
        covered.append(box)
        found.append(((box.left + box.right) / 2, (box.bottom + box.top) / 2))
    return found
