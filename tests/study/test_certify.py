"""Budgets that are called good enough are, as often as it is said."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

pytest.importorskip("scipy")

from kvpolicy.study.certify import certify, foreseen, needed, p_value, upper_bound


def drawn(generator, count, lost, won):
    return generator.choices([1.0, -1.0, 0.0], weights=[lost, won, 1 - lost - won], k=count)


@pytest.mark.parametrize(("lost", "won"), [(0.05, 0.0), (0.08, 0.03), (0.25, 0.2)])
@pytest.mark.parametrize("count", [60, 250])
def test_a_loss_as_large_as_the_bound_is_hardly_ever_called_smaller(lost, won, count):
    generator = random.Random(7)
    wrong = sum(p_value(drawn(generator, count, lost, won), 0.05, binary=True) <= 0.05 for _ in range(400))
    assert wrong <= 30  # 20 are expected at most; more than 30 come once in a hundred times


@pytest.mark.parametrize("high", [1.0, 0.5])
def test_losses_between_problems_that_are_right_and_wrong_are_tested_too(high):
    generator = random.Random(8)

    def losses(count):  # mean 0.05, neither 0 nor 1
        return [high if generator.random() < 0.05 / high else 0.0 for _ in range(count)]

    assert sum(p_value(losses(200), 0.05, binary=False) <= 0.05 for _ in range(400)) <= 30


def test_what_is_lost_without_anything_won_is_tested_by_counting():
    """Of 200 problems 0.05 are lost at least: 3 or fewer come with probability 0.009."""
    losses = [1.0] * 3 + [0.0] * 197
    exact = sum(math.comb(200, k) * 0.05**k * 0.95 ** (200 - k) for k in range(4))
    assert p_value(losses, 0.05, binary=True) == pytest.approx(exact / 0.75)


def test_what_is_won_counts_against_what_is_lost():
    lost = [1.0] * 60 + [0.0] * 1940
    won = [1.0] * 60 + [-1.0] * 55 + [0.0] * 1885
    assert p_value(won, 0.03, binary=True) < 0.01 < 0.5 < p_value(lost, 0.03, binary=True)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("bound", "level"), [(0.02, 0.05), (0.1, 0.2), (0.005, 0.01)])
def test_as_many_as_are_needed_are_enough_and_one_less_is_not(bound, level, binary):
    count = needed(bound, level, binary=binary)
    assert p_value([0.0] * count, bound, binary=binary) <= level < p_value([0.0] * (count - 1), bound, binary=binary)
    # No test that is right at this level can do with fewer: so often nothing is lost at the bound itself.
    assert math.log(level) / math.log(1 - bound) <= count < 1.35 * math.log(level) / math.log(1 - bound)


def test_the_numbers_that_the_docs_have():
    page = (Path(__file__).resolve().parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")
    counted, bet = ([needed(bound, 0.05, binary=binary) for bound in (0.05, 0.02, 0.01)] for binary in (True, False))
    assert "at 95 % it needs {} problems for 5 points, {} for 2, and\n{} for 1 (".format(*counted) in page
    assert "({}, {} and {} where a problem has several runs)".format(*bet) in page


def test_the_order_of_problems_does_not_matter():
    losses = [*drawn(random.Random(3), 300, 0.02, 0.01), 0.25, -0.5, 0.125]
    once = p_value(losses, 0.04, binary=False)
    random.Random(4).shuffle(losses)
    assert p_value(losses, 0.04, binary=False) == pytest.approx(once, rel=1e-12)


def test_the_upper_bound_is_where_the_test_turns():
    losses = [1.0] * 4 + [-1.0] + [0.0] * 295
    high = upper_bound(losses, 0.05, binary=True)
    assert p_value(losses, high, binary=True) <= 0.05 < p_value(losses, high - 2e-4, binary=True)
    assert upper_bound([1.0] * 20, 0.05, binary=True) == pytest.approx(1.0, abs=2e-4)


def test_budgets_are_tested_from_the_largest_down_until_one_fails():
    none, some = [0.0] * 300, [1.0] * 20 + [0.0] * 280
    found = certify([none, some, none], 0.02, 0.05, binary=True)
    assert [each.certified for each in found] == [True, False, False]
    assert [each.reached for each in found] == [True, True, False]
    assert found[2].p <= 0.05, "good enough by itself, but a larger one is not"


def test_how_many_would_do_is_foreseen():
    losses = [1.0] + [0.0] * 99
    count = foreseen(losses, 0.02, 0.05, binary=True)
    assert p_value(losses * (count // 100), 0.02, binary=True) <= 0.05
    assert p_value(losses * (count // 100 - 1), 0.02, binary=True) > 0.05
    assert foreseen([1.0] * 3 + [0.0] * 97, 0.02, 0.05, binary=True) is None


def test_the_chosen_budget_is_good_enough_as_often_as_is_said():
    """Three budgets, of which the second loses just the bound: to go below it is the only mistake that can be made."""
    generator = random.Random(11)
    mistakes = 0
    for _ in range(300):
        losses = [drawn(generator, 220, lost, 0.0) for lost in (0.0, 0.03, 0.3)]
        mistakes += certify(losses, 0.03, 0.05, binary=True)[1].certified
    assert mistakes <= 24
