"""Which budgets lose less than a bound, with a confidence that holds for any distribution of the losses.

A *loss* is what a policy loses against the full cache on one problem, in [-1, 1]; problems are taken for independent
draws of a workload. The hypothesis that the mean loss of that workload is at least the bound gets a p value that is
valid for every number of problems. Budgets are tested from the largest down, each at the full level, until one is not
rejected: with the stated confidence, every budget before that one is good enough. This is fixed-sequence testing as
in *Learn then Test* (Angelopoulos, Bates, Candès, Jordan and Lei, 2021, arXiv 2110.01052, section 2.3).

Two tests share the level. Where problems are right or wrong, the number of lost ones is compared with a binomial
distribution, which is exact when nothing is won. The other one bets against the hypothesis (Waudby-Smith and Ramdas,
*Estimating means of bounded random variables by betting*, JRSS B 86, 2024, section 4): its capital is a nonnegative
supermartingale under the hypothesis whatever is bet, so that one over the capital is a p value. The bet is a mixture
of constant ones, for which the order of the problems does not matter.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvpolicy.study.extra import library

_COUNTED: Final = 0.75
"""Share of the level of the binomial test; betting gets the rest."""
_BETS: Final = 12
_LEAST_BET: Final = 1 / 256
"""The least bet as a share of the highest; what is between goes by equal factors."""
_ALL_IN: Final = 0.5
"""Share of the capital that is bet as high as can be, which no loss of 1 survives; where problems are right or wrong
the binomial test is better at that."""
_MOST_PROBLEMS: Final = 10_000_000


@dataclass(frozen=True)
class TestedBudget:
    """A budget and what can be said of its loss.

    Attributes:
        loss: mean over problems.
        at_most: upper bound of the workload's mean loss at the confidence, taken for itself.
        p: p value of the hypothesis that it is at least the bound that was asked for.
        certified: whether it is good enough: this p value and those of all larger budgets are small enough.
        reached: whether all larger budgets were good enough, so that it was this one's turn.
    """

    loss: float
    at_most: float
    p: float
    certified: bool
    reached: bool


def certify(losses: Sequence[Sequence[float]], bound: float, level: float, *, binary: bool) -> list[TestedBudget]:
    """Test budgets in their order, the largest first.

    Args:
        losses: of each budget, one value in [-1, 1] for each problem.
        bound: largest mean loss that is good enough, between 0 and 1.
        level: one less the confidence.
        binary: every loss is -1, 0 or 1, for every possible outcome of the runs.
    """
    good = passing(losses, bound, level, binary=binary)
    return [
        TestedBudget(
            loss=math.fsum(values) / len(values),
            at_most=upper_bound(values, level, binary=binary),
            p=p_value(values, bound, binary=binary),
            certified=i < good,
            reached=i <= good,
        )
        for i, values in enumerate(losses)
    ]


def passing(losses: Sequence[Sequence[float]], bound: float, level: float, *, binary: bool) -> int:
    """Return how many budgets are good enough: those before the first one that is not shown to be.

    Args:
        losses, bound, level, binary: as for `certify`.
    """
    tests = (p_value(values, bound, binary=binary) <= level for values in losses)
    return sum(1 for _ in itertools.takewhile(bool, tests))


def p_value(losses: Sequence[float], bound: float, *, binary: bool) -> float:
    """Return a p value of the hypothesis that the mean loss is at least `bound`.

    Args:
        losses: one value in [-1, 1] for each problem, at least one.
        bound: between 0 and 1.
        binary: every loss is -1, 0 or 1, for every possible outcome of the runs.
    """
    return _p_value(Counter(losses), bound, binary=binary)


def _p_value(losses: Mapping[float, int], bound: float, *, binary: bool) -> float:
    """Return the p value for losses that come so many times each."""
    betting = math.exp(min(0.0, -_capital(losses, bound, all_in=0.0 if binary else _ALL_IN)))
    if not binary:
        return betting
    lost = sum(times for value, times in losses.items() if value > 0)
    stats = library("scipy.stats", "the tests of a study need")
    counted = float(stats.binom.cdf(lost, sum(losses.values()), bound))
    return min(1.0, counted / _COUNTED, betting / (1 - _COUNTED))


def _capital(losses: Mapping[float, int], bound: float, *, all_in: float) -> float:
    """Return the logarithm of the capital after bets that the mean loss is below the bound.

    A bet of `b` multiplies the capital with ``1 + b (bound - loss)`` at each problem, whose mean is at most 1 under the
    hypothesis; with `b` up to ``1 / (1 - bound)`` it is never negative.
    """
    import numpy as np

    most = 1 / (1 - bound)
    bets = np.append(np.geomspace(_LEAST_BET, 1 - 1 / _BETS, _BETS), 1.0) * most
    shares = np.append(np.full(_BETS, (1 - all_in) / _BETS), all_in)
    values, times = (np.asarray(list(each), dtype=np.float64) for each in (losses.keys(), losses.values()))
    with np.errstate(divide="ignore"):
        logs = np.log(np.maximum(1 + np.outer(bets, bound - values), 0.0)) @ times
    highest = logs.max()
    return float(highest + np.log((shares * np.exp(logs - highest)).sum()))


def upper_bound(losses: Sequence[float], level: float, *, binary: bool) -> float:
    """Return the least bound, to 1e-4, that the losses are below with the confidence ``1 - level``."""
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(losses, middle, binary=binary) <= level else (middle, high)
    return high


def needed(bound: float, level: float, *, binary: bool) -> int:
    """Return with how many problems a budget that loses nothing at all is good enough: with fewer none can be.

    Args:
        bound, level, binary: as for `certify`.
    """
    return _least(lambda count: _p_value({0.0: count}, bound, binary=binary) <= level)


def foreseen(losses: Sequence[float], bound: float, level: float, *, binary: bool) -> int | None:
    """Return about how many problems would be enough if others went like these; None if they never would.

    Args:
        losses: one value for each problem; their mean is what others are taken to lose too.
        bound, level, binary: as for `certify`.
    """
    if math.fsum(losses) / len(losses) >= bound:
        return None
    counts = Counter(losses)

    def enough(times: int) -> bool:
        many = {value: count * times for value, count in counts.items()}
        return _p_value(many, bound, binary=binary) <= level

    times = _least(enough)
    return times * len(losses) if times < _MOST_PROBLEMS else None


def _least(enough: Callable[[int], bool]) -> int:
    """Return the least number that is enough, given that all larger ones are; at most `_MOST_PROBLEMS`."""
    low, high = 0, 1
    while high < _MOST_PROBLEMS and not enough(high):
        low, high = high, min(2 * high, _MOST_PROBLEMS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
