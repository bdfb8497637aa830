"""`apportion` and `pooled_counts` against exact fractions, exhaustive search and sorting by hand."""

from __future__ import annotations

import itertools
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvpolicy import ops


@st.composite
def shares(draw, most=6):
    """Integer weights, bounds with `low <= high`, and a total that the bounds allow."""
    n = draw(st.integers(1, 5))
    weights = draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    low = draw(st.lists(st.integers(0, most // 2), min_size=n, max_size=n))
    high = [a + draw(st.integers(0, most - a)) for a in low]
    return weights, draw(st.integers(sum(low), sum(high))), low, high


def run(weights, total, low, high):
    tensors = [torch.tensor([x]) for x in (weights, total, low, high)]
    return ops.apportion(tensors[0].float(), *tensors[1:])[0].tolist()


def exact(weights, total, low, high):
    """Water-filling in fractions; weightless cells only fill what the others leave."""
    weights = weights if any(weights) else [1] * len(weights)
    tiny = Fraction(1, 10**15)
    w = [Fraction(x, max(weights)) if x else tiny for x in weights]

    def clamped(a):
        return [min(max(a * x, lo), hi) for x, lo, hi in zip(w, low, high, strict=True)]

    bends = sorted({Fraction(b) / x for x, lo, hi in zip(w, low, high, strict=True) for b in (lo, hi)})
    for left, right in itertools.pairwise([Fraction(0), *bends, bends[-1] + 1]):
        at_left, at_right = sum(clamped(left)), sum(clamped(right))
        if at_left <= total <= at_right:
            a = left if at_left == at_right else left + (right - left) * (total - at_left) / (at_right - at_left)
            return clamped(a)
    raise AssertionError("the bounds do not allow the total")


@given(shares())
def test_equals_exact_fractions(case):
    _, total, low, high = case
    got, real = run(*case), exact(*case)
    assert sum(got) == total
    assert all(lo <= c <= hi for c, lo, hi in zip(got, low, high, strict=True))
    # Weightless cells stand at 1e-15 of the largest weight, far below the grid of ties.
    fractions = [round(float(x) * 2**20) % 2**20 for x in real]
    whole = [round(float(x) * 2**20) // 2**20 for x in real]
    first = sorted(range(len(real)), key=lambda i: (-fractions[i], i))[: total - sum(whole)]
    assert got == [n + (i in first) for i, n in enumerate(whole)]


@given(shares(most=4))
def test_no_other_integers_within_the_bounds_are_nearer(case):
    _, total, low, high = case
    real = exact(*case)

    def distance(counts):
        return sum((c - x) ** 2 for c, x in zip(counts, real, strict=True))

    every = itertools.product(*[range(lo, hi + 1) for lo, hi in zip(low, high, strict=True)])
    nearest = min(distance(c) for c in every if sum(c) == total)
    assert float(distance(run(*case)) - nearest) < 1e-9


def test_rows_are_shared_as_if_alone():
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(3, 4, 7, generator=generator, dtype=torch.float64)
    low = torch.randint(0, 5, (3, 4, 7), generator=generator)
    high = low + torch.randint(0, 9, (3, 4, 7), generator=generator)
    total = (low.sum(-1) + high.sum(-1)) // 2
    together = ops.apportion(weights, total, low, high)
    assert torch.equal(together.sum(-1), total)
    for row in itertools.product(range(3), range(4)):
        assert torch.equal(together[row], ops.apportion(weights[row], total[row], low[row], high[row]))


@pytest.mark.parametrize(
    ("weights", "total", "low", "high", "expected"),
    [
        ([18, 38 / 3, 22 / 3, 2], 40, [0] * 4, [100] * 4, [18, 13, 7, 2]),
        ([1, 1, 1], 4, [0] * 3, [9] * 3, [2, 1, 1]),
        ([1, 0, 0], 5, [0] * 3, [9] * 3, [5, 0, 0]),
        ([1, 0, 0], 5, [0] * 3, [2, 9, 9], [2, 2, 1]),
        ([0, 0], 3, [0] * 2, [9] * 2, [2, 1]),
        ([1e-30, 1], 9, [0] * 2, [99] * 2, [0, 9]),
        ([1, 1], 99, [0] * 2, [3, 4], [3, 4]),
        ([1, 1], 0, [2, 3], [9, 9], [2, 3]),
        ([5], 7, [0], [9], [7]),
    ],
    ids=["golden G4", "ties to the first", "weightless", "full", "no weights", "tiny", "too much", "too little", "one"],
)
def test_by_hand(weights, total, low, high, expected):
    assert run(weights, total, low, high) == expected


def test_large_budgets_of_many_cells_add_up():
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(4, 640, generator=generator).square()
    high = torch.randint(1, 120_000, (4, 640), generator=generator)
    total = (high.sum(-1) * torch.tensor([0.01, 0.3, 0.7, 0.999])).long()
    got = ops.apportion(weights, total, torch.zeros_like(high), high)
    assert torch.equal(got.sum(-1), total)
    assert (got <= high).all()


def test_no_cells():
    empty = torch.zeros(2, 0, dtype=torch.int64)
    assert ops.apportion(empty.float(), torch.zeros(2, dtype=torch.int64), empty, empty).shape == (2, 0)


@given(st.data())
def test_pooled_counts_equal_sorting_by_hand(data):
    m, cells = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    scores = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=m, max_size=m))
    owner = data.draw(st.lists(st.integers(0, cells - 1), min_size=m, max_size=m))
    taking_part = data.draw(st.lists(st.booleans(), min_size=m, max_size=m))
    total = data.draw(st.integers(0, m + 1))
    ranked = sorted((i for i in range(m) if taking_part[i]), key=lambda i: (-scores[i], i))[:total]
    poisoned = torch.tensor([scores]).masked_fill(~torch.tensor([taking_part]), float("nan"))
    got = ops.pooled_counts(poisoned, torch.tensor(owner), torch.tensor([taking_part]), torch.tensor([total]), cells)
    assert got.tolist() == [[sum(owner[i] == c for i in ranked) for c in range(cells)]]
