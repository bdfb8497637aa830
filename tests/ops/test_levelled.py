"""Scores that differ by no more than rounding are made equal; levels are bounded, and rounding does not move them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from kvpolicy import ops


def _all(scores):
    return torch.ones_like(scores, dtype=torch.bool)


def _expected(scores: list[float], near: float) -> list[float]:
    """The definition once more, one score after the other."""
    order = sorted(range(len(scores)), key=lambda n: scores[n])
    runs: list[list[int]] = []
    for n in order:
        if runs and _near(scores[runs[-1][-1]], scores[n], near):
            runs[-1].append(n)
        else:
            runs.append([n])
    level = list(scores)
    part = 2 ** (math.floor(math.log2(near)) + 23) if near else 1
    for run in runs:
        whole = _near(scores[run[0]], scores[run[-1]], near)
        for before, n in pairwise(run):
            same = whole or _last_places(scores[before]) // part == _last_places(scores[n]) // part
            level[n] = level[before] if same else scores[n]
    return level


def _near(low: float, high: float, near: float) -> bool:
    return high - low <= near * max(abs(low), abs(high))


def _last_places(score: float) -> int:
    """How many fp32 numbers lie between 0 and a score."""
    bits = int(torch.tensor(score).abs().view(torch.int32))
    return bits if score >= 0 else -bits - 1


@pytest.mark.parametrize("shift", [0.0, 2.0, 9.0])
@pytest.mark.parametrize("near", [0.0, 0.05, 0.4])
def test_runs_of_near_scores_are_levelled(near, shift):
    generator = torch.Generator().manual_seed(7)
    scores = torch.rand(2, 3, 60, generator=generator).mul(4).round() + 0.1 * torch.rand(2, 3, 60, generator=generator)
    mask = torch.rand(2, 3, 60, generator=generator) < 0.8
    mask[1, 1], mask[1, 2] = False, True
    scores -= shift
    got = ops.levelled(scores.masked_fill(~mask, float("nan")), mask, near)
    assert (got[~mask] == 0).all()
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        inside = mask[b, h]
        assert got[b, h][inside].tolist() == pytest.approx(_expected(scores[b, h][inside].tolist(), near), abs=0)
    assert bool((got != scores.masked_fill(~mask, 0.0)).any()) == (near > 0)


@pytest.mark.parametrize("count", [4096, 32768, 131072])
def test_a_level_is_no_wider_than_rounding_however_dense_scores_lie(count):
    scores = 0.3 + 0.02 * torch.rand(1, 1, count, generator=torch.Generator().manual_seed(0))
    level = ops.levelled(scores, _all(scores))
    assert float(((scores - level) / scores).max()) <= ops.ROUNDING
    assert (level <= scores).all()
    # As many as the range has room for, and every score of it is there: no more than a half is lost to rounding.
    assert level.unique().numel() >= min(scores.unique().numel(), 0.02 / (0.3 * ops.ROUNDING)) / 2


@pytest.mark.parametrize("sign", [1, -1])
def test_what_rounding_sets_apart_is_equal_again(sign):
    """The scores of repeated tokens, each with an error of its own, on two machines."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 40, (1, 2, 300), generator=generator)
    true = sign * (1 + 9 * torch.rand(40, generator=generator, dtype=torch.float64))[tokens]

    def machine():
        return (true * (1 + 2e-7 * torch.rand(true.shape, generator=generator, dtype=torch.float64))).float()

    levels = [ops.levelled(scores, _all(scores)) for scores in (machine(), machine())]
    for level in levels:
        for h in range(2):
            assert all(len(level[0, h][tokens[0, h] == t].unique()) == 1 for t in tokens[0, h].unique())
    counts, nothing = torch.full((1, 2), 130), torch.zeros_like(_all(levels[0]))
    kept = [ops.top_k(level, counts, nothing, ~nothing).indices for level in levels]
    assert torch.equal(*kept)


def test_rounding_of_one_score_moves_no_level_but_its_own():
    """Counted from its first score, a level would start elsewhere, and all above it: the scores have no gaps."""
    scores = 0.3 + 0.002 * torch.rand(1, 1, 20000, generator=torch.Generator().manual_seed(1))
    other = scores.clone()
    lowest = scores[0, 0].argsort()[:5]
    other[0, 0, lowest] *= 1 + 3e-7
    before, after = ops.levelled(scores, _all(scores)), ops.levelled(other, _all(scores))
    moved = (before != after)[0, 0].nonzero()[:, 0]
    assert len(moved) <= 60
    assert float(scores[0, 0, moved].max()) < float(scores.min()) * (1 + 8 * ops.ROUNDING)


def test_order_stays_and_levelling_twice_changes_little():
    scores = torch.randn(2, 2, 5000, generator=torch.Generator().manual_seed(5)).mul(1e-5).exp()
    level = ops.levelled(scores, _all(scores))
    ordered = level.gather(-1, scores.argsort(-1))
    assert (ordered.diff(dim=-1) >= 0).all()
    assert float((scores / level - 1).max()) <= ops.ROUNDING


def test_zero_numbers_without_a_value_and_the_largest_numbers():
    largest = torch.finfo(torch.float32).max
    scores = torch.tensor([[[0.0, -0.0, math.nan, math.inf, -math.inf, largest, -largest, 1.0, 1.0000001, -1.0]]])
    level = ops.levelled(scores, _all(scores))[0, 0].tolist()
    assert level[:2] == [0.0, 0.0]
    assert math.isnan(level[2])
    assert level[3:] == [math.inf, -math.inf, largest, -largest, 1.0, 1.0, -1.0]


def test_nothing_is_levelled_and_has_no_place():
    nothing, mask = torch.zeros(2, 1, 0), torch.ones(2, 1, 0, dtype=torch.bool)
    assert ops.levelled(nothing, mask, 0.1).shape == ops.places(nothing, mask).shape == (2, 1, 0)
