"""The smallest budget of a study that is good enough, for each policy and dataset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kvpolicy.errors import KVPolicyError, did_you_mean
from kvpolicy.study.asked import Asked
from kvpolicy.study.certify import TestedBudget, certify, foreseen, needed
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.records import CellRecord, Recorded, RunRecord
from kvpolicy.study.report.budgets import BudgetAxis, budget_axis, budget_of, without_budget
from kvpolicy.study.runs import REFERENCE

METRICS_OF_LOSS: Final = ("exact", "score", "progress")
"""Metrics between 0 and 1 that the full cache has too: their differences have bounds, which a mean needs."""

EVERYWHERE: Final = "all datasets"

_Losses = dict[int, float]
_Where = tuple[str, str, str, str]  # model, dataset, policy, condition


@dataclass(frozen=True)
class BudgetAnswer:
    """What can be said of one policy in one place.

    Attributes:
        model: name of the model.
        dataset: label of the dataset; `EVERYWHERE` for what holds on each of them.
        policy: the variant without its budget.
        condition: the condition without its budget; may be empty.
        problems: how many the answer is made of; of the dataset with the fewest.
        budgets: labels of the budgets, the largest first.
        tested: what was found for each.
        foreseen: about how many problems would do for the largest budget, where it was not good enough; None if none
            would.
    """

    model: str
    dataset: str
    policy: str
    condition: str
    problems: int
    budgets: tuple[str, ...]
    tested: tuple[TestedBudget, ...]
    foreseen: int | None = None

    @property
    def smallest(self) -> str | None:
        """The smallest budget that is good enough; None if none is."""
        good = [label for label, found in zip(self.budgets, self.tested, strict=True) if found.certified]
        return good[-1] if good else None


@dataclass(frozen=True)
class LostMetric:
    """What policies lose against the full cache.

    Attributes:
        metric: what is lost.
        binary: every loss is -1, 0 or 1, for every possible outcome of the runs.
        budgets: labels of the study's budgets, the largest first.
        lines: (model, dataset, policy, condition) -> label of the budget, the largest first -> loss by problem.
    """

    metric: str
    binary: bool
    budgets: tuple[str, ...]
    lines: Mapping[_Where, Mapping[str, _Losses]]


def losses_of(results: Recorded, asked: Asked, metric: str | None = None) -> LostMetric:
    """Return what each policy loses on each problem, as `sufficient` takes it.

    Args:
        results: what was recorded.
        asked: what the study asks for.
        metric: what is lost; the first of the study's metrics that can be if None.

    Raises:
        KVPolicyError: the study compares no budgets, is not finished, or has no such metric.
    """
    axis = _axis(asked)
    found = {record.key: record for record in results.records(asked.keys, outputs=False)}
    chosen = _metric(asked, metric, {name for record in found.values() for name in record.metrics})
    missing = len(asked.keys - found.keys())
    if missing:
        raise KVPolicyError(
            f"budget: {missing:,} of the {len(asked.keys):,} runs that the study asks for are missing; run it first."
        )
    binary = METRICS[chosen].binary and not _several_runs(asked, found)
    lines = _lines(asked, axis, found, chosen)
    if not lines:
        raise KVPolicyError(f"budget: no dataset of the study gives {chosen}, so there is no loss of it.")
    return LostMetric(chosen, binary, axis.labels[::-1], lines)


def sufficient(
    results: Recorded,
    asked: Asked,
    *,
    loss: float,
    confidence: float,
    metric: str | None = None,
    together: bool = False,
) -> tuple[str, list[BudgetAnswer]]:
    """Return the metric, and for every policy, condition and dataset the smallest budget that is good enough.

    Only runs that the study asks for as it is count, and all of them have to be there. A run that failed counts as if
    the policy had been entirely wrong where the full cache was entirely right.

    Args:
        results: what was recorded.
        asked: what the study asks for.
        loss: largest mean loss against the full cache that is good enough, between 0 and 1.
        confidence: with which each answer holds.
        metric: what is lost; the first of the study's metrics that can be if None.
        together: all answers hold together with that confidence, not each by itself.

    Raises:
        KVPolicyError: the study compares no budgets, is not finished, has no such metric, or too few problems for any
            budget to be good enough: then it says how many are needed.
    """
    lost = losses_of(results, asked, metric)
    lines, binary = lost.lines, lost.binary
    places = _places(lines)
    level = (1 - confidence) / (len(lines) if together else 1)
    least = needed(loss, level, binary=binary)
    fewest = min(len(losses) for line in lines.values() for losses in line.values())
    if fewest < least:
        sure = f"a loss below {100 * loss:g} points with a confidence of {100 * (1 - level):g} %"
        raise KVPolicyError(
            f"budget: {fewest:,} problems are too few to show {sure}, even if nothing is lost; at least {least:,} are "
            "needed: raise `samples` or add seeds."
        )
    answers = []
    for (model, policy, condition), datasets in places.items():
        made = []
        for dataset in datasets:
            line = lines[model, dataset, policy, condition]
            values = [list(losses.values()) for losses in line.values()]
            tested = tuple(certify(values, loss, level, binary=binary))
            more = None if tested[0].certified else foreseen(values[0], loss, level, binary=binary)
            made.append(BudgetAnswer(model, dataset, policy, condition, len(values[0]), tuple(line), tested, more))
        answers += made
        if len(made) > 1:
            answers.append(_everywhere(made, lost.budgets))
    return lost.metric, answers


def _axis(asked: Asked) -> BudgetAxis:
    axis = budget_axis([cell for cell in asked.cells if cell.name != REFERENCE])
    if axis is None:
        raise KVPolicyError("budget: the study compares fewer than two budgets; give it several under `conditions`.")
    if not axis.ordered:
        raise KVPolicyError(
            f"budget: the study's budgets are of several kinds ({', '.join(axis.labels)}), so that none is the "
            "smallest; write all as entries, as shares, or as shares of the trace."
        )
    return axis


def _metric(asked: Asked, metric: str | None, measured: Collection[str]) -> str:
    wanted = asked.study.get("metrics") or METRICS_OF_LOSS
    if metric is None:
        able = [name for name in wanted if name in METRICS_OF_LOSS]
        metric = next((name for name in able if name in measured), next(iter(able), None))
        if metric is None:
            raise KVPolicyError(
                f"budget: the study measures none of {', '.join(METRICS_OF_LOSS)}; add one to `metrics`."
            )
    if metric not in METRICS_OF_LOSS:
        meant = did_you_mean(metric, METRICS_OF_LOSS)
        why = "has no bounds, or the full cache does not have it" if metric in METRICS else "is not known"
        raise KVPolicyError(f"--metric: {metric!r} {why}.{meant} Write one of {', '.join(METRICS_OF_LOSS)}.")
    return metric


def _several_runs(asked: Asked, found: Mapping[str, RunRecord]) -> bool:
    """Whether a problem has several runs, whose mean need not be 0 or 1."""
    for cell in asked.cells:
        problems = [found[key].problem for key in cell.keys if found[key].kind == "generate"]
        if len(set(problems)) < len(problems):
            return True
    return False


def _lines(
    asked: Asked, axis: BudgetAxis, found: Mapping[str, RunRecord], metric: str
) -> dict[_Where, dict[str, _Losses]]:
    """Return the losses of each policy in each place, by label of the budget, the largest first.

    Budgets that are not possible there are left out.
    """
    graded = _graded(asked, found, metric)
    full = {
        (cell.model, cell.dataset): _values(cell, found, metric, graded[cell.model, cell.dataset], failed=1.0)
        for cell in asked.cells
        if cell.name == REFERENCE
    }
    lines: dict[_Where, dict[int, _Losses]] = defaultdict(dict)
    for cell in asked.cells:
        whole = full.get((cell.model, cell.dataset))
        budget = budget_of(cell)
        if cell.name == REFERENCE or not whole or budget not in axis.texts or not cell.keys:
            continue
        mine = _values(cell, found, metric, graded[cell.model, cell.dataset], failed=0.0)
        place = (
            cell.model,
            cell.dataset,
            without_budget(cell.name, cell) or str(cell.data.get("policy", cell.name)),
            without_budget(cell.condition, cell),
        )
        if mine:
            lines[place][axis.texts.index(budget)] = {n: whole[n] - value for n, value in mine.items() if n in whole}
    return {
        place: {axis.labels[i]: losses for i, losses in sorted(of.items(), reverse=True)} for place, of in lines.items()
    }


def _graded(asked: Asked, found: Mapping[str, RunRecord], metric: str) -> Mapping[tuple[str, str], set[int]]:
    """Return the problems of each model and dataset for which some run has the metric: other tasks have another one."""
    problems: dict[tuple[str, str], set[int]] = defaultdict(set)
    for run in (found[key] for cell in asked.cells for key in cell.keys):
        if run.kind == "generate" and metric in run.metrics:
            problems[run.model, run.dataset].add(run.problem)
    return problems


def _values(
    cell: CellRecord, found: Mapping[str, RunRecord], metric: str, problems: Collection[int], *, failed: float
) -> _Losses:
    """Return the mean over runs by problem, of those that are graded so; a failed run is taken for `failed`."""
    values: dict[int, list[float]] = defaultdict(list)
    for run in (found[key] for key in cell.keys):
        if run.kind == "generate" and run.problem in problems:
            values[run.problem].append(run.metrics.get(metric, failed))
    return {problem: sum(of) / len(of) for problem, of in sorted(values.items())}


def _places(lines: Mapping[_Where, object]) -> dict[tuple[str, str, str], list[str]]:
    """Return the datasets of each model, policy and condition."""
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for model, dataset, policy, condition in lines:
        found[model, policy, condition].append(dataset)
    return dict(found)


def _everywhere(made: Sequence[BudgetAnswer], labels: Sequence[str]) -> BudgetAnswer:
    """Return what holds on every dataset: a budget that is good enough on each of them.

    That one of them loses too much is rejected only where each is, so that the level stays what it is.
    """
    first = made[0]
    common = tuple(label for label in labels if all(label in answer.budgets for answer in made))
    tested = []
    for label in common:
        each = [answer.tested[answer.budgets.index(label)] for answer in made]
        worst = max(each, key=lambda found: found.at_most)
        certified, reached = all(found.certified for found in each), all(found.reached for found in each)
        tested.append(TestedBudget(worst.loss, worst.at_most, max(found.p for found in each), certified, reached))
    fewest = min(answer.problems for answer in made)
    return BudgetAnswer(first.model, EVERYWHERE, first.policy, first.condition, fewest, common, tuple(tested))
