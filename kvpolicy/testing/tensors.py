"""Small tensors, drawn as values. Most slots hold one of 256 fixed vectors; numbers lie on a coarse grid."""

from __future__ import annotations

import random
from typing import Literal

from kvpolicy.testing._extra import require_hypothesis

require_hypothesis()

import torch  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.strategies import DrawFn  # noqa: E402
from torch import Tensor  # noqa: E402

HEAD_DIM = 4


def _vector_table(dim: int) -> Tensor:
    """Return 256 vectors on the grid of quarters, the simplest first: zero, unit vectors, their multiples, others."""
    rng = random.Random(0)  # noqa: S311
    unit = [[float(i == j) for j in range(dim)] for i in range(dim)]
    rows = [[0.0] * dim, *unit]
    rows += [[factor * x for x in row] for factor in (-1.0, 2.0, 0.5) for row in unit]
    while len(rows) < 256:
        rows.append([rng.randint(-8, 8) / 4 for _ in range(dim)])
    return torch.tensor(rows)


_TABLE = _vector_table(HEAD_DIM)


@st.composite
def codes(draw: DrawFn, count: int) -> list[int]:
    """Draw `count` integers from 0 to 255, often only few different ones."""
    kinds = draw(st.sampled_from([256, 2, 1, 5, 32]))
    return [code % kinds for code in draw(st.binary(min_size=count, max_size=count))]


@st.composite
def vectors(draw: DrawFn, *shape: int) -> Tensor:
    """Draw fp32 `[*shape, HEAD_DIM]` from the table."""
    count = torch.Size(shape).numel()
    return _TABLE[draw(codes(count))].reshape(*shape, HEAD_DIM)


@st.composite
def scores(draw: DrawFn, *shape: int, integer: bool = False) -> Tensor:
    """Draw fp32 `[*shape]` on a grid of eighths (or of integers) around 0; ties are common, and all-equal too."""
    drawn = torch.tensor(draw(codes(torch.Size(shape).numel())), dtype=torch.float32).reshape(shape)
    centred = drawn - 128 * draw(st.booleans())
    return centred if integer else centred / 8


@st.composite
def valid_slots(draw: DrawFn, rows: int, heads: int, slots: int, *, ragged: bool, least: int = 1) -> Tensor:
    """Draw bool `[rows, heads, slots]`: padding on the left, free tails, now and then a hole; `least` valid per row.

    Args:
        rows, heads, slots: shape.
        ragged: heads of one row may differ in number.
        least: valid slots that each head has at least.
    """
    # One draw per quantity, whatever the shape: a smaller shape then still reads the same choices when shrinking.
    lefts, tails, holes = draw(codes(rows)), draw(codes(rows * heads)), draw(codes(rows * heads))
    valid = torch.zeros(rows, heads, slots, dtype=torch.bool)
    for b in range(rows):
        left = lefts[b] % (slots - least + 1)
        for h in range(heads):
            which = b * heads + (h if ragged else 0)
            end = slots - tails[which] % (slots - least - left + 1)
            valid[b, h, left:end] = True
            hole = holes[which] % 32 - 1
            if end - left > least and left <= hole < end:
                valid[b, h, hole] = False
    return valid


@st.composite
def positions_of(
    draw: DrawFn, valid: Tensor, observed: int, shared: Literal["none", "heads"]
) -> tuple[Tensor, list[int]]:
    """Draw int32 positions `[B, H, N]` that increase over the valid slots, with gaps where entries were evicted.

    The newest `observed` entries have no gaps; the newest of all heads is the last token seen.

    Returns:
        positions (0 where not valid), and how many tokens each row has seen.
    """
    rows, heads, slots = valid.shape
    gaps = torch.tensor(draw(codes(rows * heads * slots))).reshape(valid.shape) % 4 // 2
    if shared == "heads":
        gaps = gaps[:, :1].expand(-1, heads, -1)
    positions = torch.zeros(valid.shape, dtype=torch.int32)
    seen = []
    for b in range(rows):
        places = []
        for h in range(heads):
            steps = [1 + int(g) for g in gaps[b, h][valid[b, h]]]
            recent = min(observed + 1, len(steps))
            steps[len(steps) - recent :] = [1] * recent
            places.append([sum(steps[:i]) for i in range(len(steps))])
        last = max((p[-1] for p in places if p), default=-1)
        seen.append(last + 1)
        for h, place in enumerate(places):
            moved = [p + last - place[-1] for p in place]
            positions[b, h, valid[b, h]] = torch.tensor(moved, dtype=torch.int32)
    return positions, seen
