"""How large a study is by what its file says alone, where its models or data sets are out of reach."""

from __future__ import annotations

from dataclasses import dataclass

from kvpolicy.study.runs import has_seed, kinds
from kvpolicy.study.source import Source
from kvpolicy.study.spec import StudySpec


@dataclass(frozen=True)
class OutlineRow:
    """What a study asks of one dataset.

    Attributes:
        dataset: its label.
        models: how many models are given it.
        problems: how many problems, if the data set has as many as are published.
        rollouts: answers to each problem where something is random.
        budget: entries per head that every policy gets here; None if each has its own.
        runs: all runs, the full cache's too.
        most: most tokens of an answer.
        tokens: most tokens that they generate.
    """

    dataset: str
    models: int
    problems: int
    rollouts: int
    budget: int | None
    runs: int
    most: int
    tokens: int


def outline(spec: StudySpec) -> list[OutlineRow]:
    """Return a row for each dataset; nothing is read, and no model is looked at."""
    return [_row(spec, source) for source in spec.datasets]


def _row(spec: StudySpec, source: Source) -> OutlineRow:
    problems = source.samples or spec.samples
    if source.size is not None:
        problems = min(problems, source.size)
    seeds = source.rollouts or len(spec.seeds)
    warm = (spec.sampling.temperature if source.temperature is None else source.temperature) > 0
    models = len(spec.models if source.models is None else source.models)

    def runs(*, random: bool, forced: bool) -> int:
        each = seeds if random or source.fresh_by_seed or (warm and source.generates) else 1
        return models * problems * each * (len(kinds(source)) if forced else 1)

    count = runs(random=False, forced=False)
    count += sum(runs(random=has_seed(variant.policy), forced=True) for variant in spec.variants())
    longest = source.max_new_tokens or source.longest or spec.sampling.max_new_tokens
    return OutlineRow(source.label, models, problems, seeds, source.budget, count, longest, count * longest)
