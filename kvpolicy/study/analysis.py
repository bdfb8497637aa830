"""From recorded runs to tables: means with intervals, and differences between variants on the same problems.

The unit is the problem: runs of one problem with several seeds are averaged first, so that intervals say how sure one
can be about *other problems*. Proportions that are 0 or 1 for each problem get Wilson's interval, everything else a
percentile bootstrap over problems.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvpolicy.errors import KVPolicyError, did_you_mean
from kvpolicy.study.endings import Endings
from kvpolicy.study.extra import library
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.records import CellRecord, Recorded, RunRecord
from kvpolicy.study.runs import REFERENCE
from kvpolicy.study.whole import refusal

RESAMPLES: Final = 9999
CONFIDENCE: Final = 0.95

ByProblem = dict[int, float]
"""Mean over seeds by problem."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its interval; the interval is NaN with fewer than two problems."""

    value: float
    low: float
    high: float
    problems: int


@dataclass(frozen=True)
class VariantSummary:
    """A variant on a dataset with a model.

    Attributes:
        cell: which.
        runs: finished runs.
        failed: failed runs.
        error: why some failed, or why the variant is not possible.
        refused: why it is not graded, in a study that is `strict`; it has no metrics then.
        tasks: the task of each problem, of a dataset that has several.
        metrics: estimates by metric, as far as there are runs.
        values: mean over seeds by metric and problem.
        cut: finished runs whose answers reached the `max_new_tokens` that the study chose.
        at_end: others whose answers reached the model's last position, where it is noted; a policy that
            re-rotates has none.
    """

    cell: CellRecord
    runs: int
    failed: int
    error: str | None
    metrics: dict[str, Estimate]
    values: dict[str, ByProblem]
    refused: str | None = None
    tasks: Mapping[int, str] = field(default_factory=dict)
    cut: int = 0
    at_end: int = 0

    def by_task(self, metric: str) -> dict[str, Estimate]:
        """Return the mean over the problems of each task, without an interval; empty for a dataset without tasks."""
        found: dict[str, list[float]] = defaultdict(list)
        for problem, value in self.values.get(metric, {}).items():
            if problem in self.tasks:
                found[self.tasks[problem]].append(value)
        return {
            task: Estimate(math.fsum(values) / len(values), math.nan, math.nan, len(values))
            for task, values in sorted(found.items())
        }

    @property
    def missing(self) -> int:
        """How many of the runs that the study asks for here are not there."""
        return len(self.cell.keys) - self.runs - self.failed


@dataclass(frozen=True)
class Comparison:
    """A variant against another on the problems that both have.

    Attributes:
        cell: the variant.
        baseline: name of the other.
        metric: what is compared.
        difference: variant minus baseline. For 0-or-1 metrics with one value per problem its interval is Tango's: all
            differences that McNemar's score test, taken for that difference, does not reject; otherwise it is a paired
            bootstrap interval.
        wins: problems with a larger value than the baseline's.
        losses: problems with a smaller one.
        paired: whether each problem is right or wrong, so that the interval is Tango's and the test McNemar's.
        p: two-sided p value: McNemar's exact test where `paired`, else a sign-flip permutation test. At the edge of
            significance the exact test is stricter than Tango's interval, which is not exact.
        p_holm: `p` after Holm's correction for all comparisons of this metric in the study.
    """

    cell: CellRecord
    baseline: str
    metric: str
    difference: Estimate
    wins: int
    losses: int
    paired: bool
    p: float
    p_holm: float


def summarise(
    results: Recorded,
    metrics: Sequence[str] = tuple(METRICS),
    cells: Sequence[CellRecord] | None = None,
    *,
    study: Mapping[str, Any] | None = None,
    strict: bool | None = None,
) -> list[VariantSummary]:
    """Return one row per variant, condition, model and dataset, in the order of the study.

    A row is made of the runs whose keys its cell asks for; other runs in the file do not count.

    Args:
        results: the results file.
        metrics: which to estimate.
        cells: what the study asks for, of `Asked`; what it asked for when it ran last if None.
        study: the study that asks for them; as it ran last if None.
        strict: grade no variant that is incomplete, ragged or mixed; as the study says if None.
    """
    study = results.study() if study is None else study
    strict = bool(study.get("strict")) if strict is None else strict
    cells = results.cells() if cells is None else cells
    wanted = {key for cell in cells for key in cell.keys}
    found = {record.key: record for record in results.records(wanted, outputs=False)}
    endings = Endings.of(study, results.models())
    return [
        _row(cell, [found[key] for key in cell.keys if key in found], metrics, endings, strict=strict) for cell in cells
    ]


def _row(
    cell: CellRecord, records: Sequence[RunRecord], metrics: Sequence[str], endings: Endings, *, strict: bool
) -> VariantSummary:
    refused = refusal(cell, records) if strict else None
    good = [record for record in records if record.error is None]
    failures = [record.error for record in records if record.error is not None]
    values = {name: _values(good, name) for name in metrics if refused is None}
    values = {name: of_problem for name, of_problem in values.items() if of_problem}
    estimates = {
        name: estimate(list(of_problem.values()), proportion=METRICS[name].binary)
        for name, of_problem in values.items()
    }
    error = cell.error or next(iter(failures), None)
    tasks = {record.problem: str(task) for record in good if (task := record.document.get("task"))}
    limited, last = (sum(map(cut, good)) for cut in (endings.is_limited, endings.is_last))
    return VariantSummary(cell, len(good), len(failures), error, estimates, values, refused, tasks, limited, last)


def _values(records: Sequence[RunRecord], metric: str) -> ByProblem:
    of_problem: dict[int, list[float]] = defaultdict(list)
    for record in records:
        # Where runs of both kinds give it, it is the run on its own that counts.
        if metric in record.metrics and (record.kind == METRICS[metric].run[0] or not _generated(records)):
            of_problem[record.problem].append(record.metrics[metric])
    return {problem: math.fsum(values) / len(values) for problem, values in sorted(of_problem.items())}


def _generated(records: Sequence[RunRecord]) -> bool:
    return any(record.kind == "generate" for record in records)


def compare(
    rows: Sequence[VariantSummary], metric: str, baseline: str | None = None, *, resamples: int = RESAMPLES
) -> list[Comparison]:
    """Compare every variant with one of them, condition by condition, on the problems that both have.

    Args:
        rows: of `summarise`.
        metric: what to compare.
        baseline: name of a variant, or "full"; the first variant of the study if None.
        resamples: of the bootstrap and the permutation test.

    Raises:
        KVPolicyError: there is no such variant.
    """
    names = list(dict.fromkeys(row.cell.name for row in rows))
    others = [name for name in names if name != REFERENCE]
    baseline = baseline or next(iter(others), REFERENCE)
    if baseline not in names:
        raise KVPolicyError(
            f"there is no variant {baseline!r}.{did_you_mean(baseline, names)} Variants: {', '.join(names)}."
        )
    bases = {
        (row.cell.model, row.cell.dataset, row.cell.condition): row.values.get(metric, {})
        for row in rows
        if row.cell.name == baseline
    }
    drafts = []
    for row in rows:
        condition = "" if baseline == REFERENCE else row.cell.condition
        base = bases.get((row.cell.model, row.cell.dataset, condition), {})
        both = [problem for problem in row.values.get(metric, {}) if problem in base]
        if row.cell.name in (baseline, REFERENCE) or not both:
            continue
        differences = [row.values[metric][problem] - base[problem] for problem in both]
        paired = METRICS[metric].binary and all(d in (-1.0, 0.0, 1.0) for d in differences)
        drafts.append((row.cell, differences, paired, _p_value(differences, paired=paired, resamples=resamples)))
    corrected = holm([p for *_, p in drafts])
    return [
        Comparison(
            cell,
            baseline,
            metric,
            _difference(differences, paired=paired, resamples=resamples),
            sum(d > 0 for d in differences),
            sum(d < 0 for d in differences),
            paired,
            p,
            p_holm,
        )
        for (cell, differences, paired, p), p_holm in zip(drafts, corrected, strict=True)
    ]


def _difference(differences: Sequence[float], *, paired: bool, resamples: int) -> Estimate:
    if not paired or len(differences) < 2:
        return estimate(differences, resamples=resamples, proportion=False)
    wins, losses, count = sum(d > 0 for d in differences), sum(d < 0 for d in differences), len(differences)
    return Estimate((wins - losses) / count, *tango(wins, losses, count), count)


def estimate(values: Sequence[float], *, proportion: bool, resamples: int = RESAMPLES) -> Estimate:
    """Return the mean of one value per problem with its 95 % interval.

    Args:
        values: at least one.
        proportion: values that are all 0 or 1 are counts of successes.
        resamples: of the bootstrap.
    """
    mean, count = math.fsum(values) / len(values), len(values)
    if count < 2:
        return Estimate(mean, math.nan, math.nan, count)
    stats = library("scipy.stats", "the intervals of a study need")
    if proportion and all(value in (0.0, 1.0) for value in values):
        wilson = stats.binomtest(round(sum(values)), count).proportion_ci(CONFIDENCE, method="wilson")
        return Estimate(mean, float(wilson.low), float(wilson.high), count)
    if max(values) == min(values):
        return Estimate(mean, mean, mean, count)
    interval = stats.bootstrap(
        (values,), _mean, confidence_level=CONFIDENCE, n_resamples=resamples, method="percentile", rng=_generator()
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), count)


def _p_value(differences: Sequence[float], *, paired: bool, resamples: int) -> float:
    """Return the p value of McNemar's exact test, or of a sign-flip permutation test."""
    stats = library("scipy.stats", "the tests of a study need")
    wins, losses, count = sum(d > 0 for d in differences), sum(d < 0 for d in differences), len(differences)
    if paired:
        return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    if not wins + losses or count < 2:  # with its sign flipped, a single difference is as large as before
        return 1.0
    flips = stats.permutation_test(
        (differences,), _mean, permutation_type="samples", n_resamples=resamples, rng=_generator()
    )
    return float(flips.pvalue)


def tango(wins: int, losses: int, count: int) -> tuple[float, float]:
    """Return Tango's score interval of a difference of paired proportions (Statistics in Medicine 17, 1998).

    An interval that takes the number of problems that differ as given would end at the estimate when all of them are
    lost, as if no other problem could ever be lost.

    Args:
        wins: problems that only the variant has right.
        losses: problems that only the baseline has right.
        count: all problems, at least one.
    """
    optimize = library("scipy.optimize", "the intervals of a study need")
    quantile = float(library("scipy.stats", "the intervals of a study need").norm.ppf((1 + CONFIDENCE) / 2))

    def score(difference: float, bound: float) -> float:
        # The share of losses that is most likely if this is the difference: a root of Tango's quadratic equation.
        linear = (2 * count - wins + losses) * difference - wins - losses
        constant = -losses * difference * (1 - difference)
        share = (math.sqrt(max(linear**2 - 8 * count * constant, 0.0)) - linear) / (4 * count)
        variance = count * (2 * share + difference * (1 - difference))
        return wins - losses - count * difference - bound * math.sqrt(max(variance, 0.0))

    found = (wins - losses) / count
    beside = 1e-9  # at the estimate itself the variance can be 0, which looks like a solution
    low = -1.0 if losses == count else optimize.brentq(score, -1.0, found - beside, args=(quantile,))
    high = 1.0 if wins == count else optimize.brentq(score, found + beside, 1.0, args=(-quantile,))
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """Return p values after Holm's step-down correction, in the order given."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, least = [1.0] * len(p), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = least
    return corrected


def _mean(values: Any, axis: int) -> Any:
    import numpy as np

    return np.mean(values, axis=axis)


def _generator() -> Any:
    """Return random numbers that are the same every time, so that a table can be made again."""
    import numpy as np

    return np.random.default_rng(0)


def shown(estimate: Estimate, metric: str) -> str:
    """Return an estimate as tables show it, shares in percent: ``93.0 [86.3, 96.6]``."""
    digits, scale = METRICS[metric].digits, METRICS[metric].scale
    value, low, high = (f"{scale * each:z,.{digits}f}" for each in (estimate.value, estimate.low, estimate.high))
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"


def failures(rows: Sequence[VariantSummary]) -> Mapping[str, int]:
    """Return the reasons why runs failed, with the number of runs."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        if row.error is not None:
            counts[row.error] += max(row.failed, 1)
    return counts


def refusals(rows: Sequence[VariantSummary]) -> list[str]:
    """Return a sentence for each variant that is not graded."""
    return [
        f"{row.cell.name}{f', {row.cell.condition},' if row.cell.condition else ''} on {row.cell.dataset} with "
        f"{row.cell.model} is not graded: {row.refused}."
        for row in rows
        if row.refused is not None
    ]


def cuts(rows: Sequence[VariantSummary]) -> list[str]:
    """Return sentences for each dataset on which answers of the full cache were cut, so that all may look worse."""
    return [
        f"{count} of {row.runs} answers of the full cache on {row.cell.dataset} with {row.cell.model} reached {where} "
        "if they should have ended by themselves."
        for row in rows
        if row.cell.name == REFERENCE
        for count, where in (
            (row.cut, "`max_new_tokens` and were cut there; raise it"),
            (row.at_end, "the model's last position and were cut there; take shorter problems or another model"),
        )
        if count
    ]
