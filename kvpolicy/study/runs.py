"""Which runs a study consists of, and how each is named, so that it is done once."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from kvpolicy.errors import KVPolicyError, SpecError
from kvpolicy.spec import PolicySpec
from kvpolicy.study import keys
from kvpolicy.study.design import FULL, Variant, identity
from kvpolicy.study.metrics import RunKind
from kvpolicy.study.models import ModelRef, measure_of
from kvpolicy.study.problem import Compress, Problem
from kvpolicy.study.sampling import Sampling
from kvpolicy.study.source import Source
from kvpolicy.study.spec import StudySpec
from kvpolicy.study.work import Item, Task

REFERENCE: Final = FULL
"""Name of the variant that keeps everything; every study has it."""


@dataclass(frozen=True)
class Run:
    """One run: a policy on a problem with a seed.

    Attributes:
        document: all that its result depends on, as `kvpolicy.study.keys` has it.
        kind: generate or force.
        model: which model.
        dataset: label of the dataset.
        problem: what the model is given.
        seed: seed of the study.
        digest: names the policy, before the seed is in it.
        policy: the policy that runs, with the seed in its random components.
        sampling: how tokens are chosen.
        teacher: the answer that is read under teacher forcing.
        attention: also measure the attention mass kept.
        compress: what is compressed to the budget once; None leaves that to the policy's trigger and phase.
    """

    document: keys.Document
    kind: RunKind
    model: ModelRef
    dataset: str
    problem: Problem
    seed: int
    digest: str
    policy: PolicySpec
    sampling: Sampling
    teacher: tuple[int, ...] = ()
    attention: bool = False
    compress: Compress | None = None

    @cached_property
    def key(self) -> str:
        """Hash of `document`."""
        return keys.key_of(self.document)


@dataclass(frozen=True)
class Cell:
    """A variant on a dataset with a model, its budget in entries.

    Attributes:
        variant: the variant.
        model: name of the model.
        dataset: label of the dataset.
        policy: the policy with its budget; None if that is not possible.
        digest: names the policy.
        error: why it is not possible.
    """

    variant: Variant
    model: str
    dataset: str
    policy: PolicySpec | None
    digest: str
    error: str | None = None


def digest_of(policy: PolicySpec) -> str:
    """Return a name for what a policy does, whatever it is called."""
    return _hash(identity(policy))[:16]


def kinds(source: Source) -> tuple[RunKind, ...]:
    """Return the kinds of runs that a dataset takes."""
    if not source.generates:
        return ("force",)
    return ("generate", "force") if source.forced else ("generate",)


class Plan:
    """The runs of a study.

    Args:
        spec: the study.
        models: its models, found.

    Raises:
        KVPolicyError: a dataset cannot be read.
    """

    def __init__(self, spec: StudySpec, models: Sequence[ModelRef]) -> None:
        self.spec = spec
        self.models = list(models)
        self.variants = spec.variants()
        self.reference = Variant(
            REFERENCE, "", PolicySpec(policy=REFERENCE, budget=1.0, trigger={"every": 1 << 20}, importance="none")
        )
        self._codes = keys.Codes()
        self._code_of: dict[str, str] = {}
        self._problems: dict[tuple[str, str], dict[int, list[Problem]]] = {}
        for source in spec.datasets:
            shared = None if source.measured else self._problems_of_seeds(source, None)
            for model in self.models:
                if source.models is None or model.name in source.models:
                    of_seed = self._problems_of_seeds(source, model) if shared is None else shared
                    self._problems[model.name, source.label] = of_seed

    def _problems_of_seeds(self, source: Source, model: ModelRef | None) -> dict[int, list[Problem]]:
        count, seeds = source.samples or self.spec.samples, self.seeds(source)
        measure = None if model is None else measure_of(model)
        found = {seed: source.problems(count, seed, measure) for seed in (seeds if source.fresh_by_seed else seeds[:1])}
        if not any(found.values()):
            raise KVPolicyError(f"datasets: {source.label} has no problem in it; name another file or split.")
        if any(variant.compress == "context" for variant in self.variants):
            _check_contexts(source, [problem for problems in found.values() for problem in problems])
        return found

    def problems(self, model: ModelRef, source: Source) -> dict[int, list[Problem]]:
        """Return what a model is given of a dataset, by seed; by the first one alone where seeds change no problem."""
        return self._problems[model.name, source.label]

    def seeds(self, source: Source) -> tuple[int, ...]:
        """Return the seeds of a dataset: those of its rollouts, or the study's."""
        return self.spec.seeds if source.rollouts is None else tuple(range(source.rollouts))

    def places(self) -> list[tuple[ModelRef, Source]]:
        """Return every model with every dataset that it is given, model by model."""
        return [
            (model, source)
            for model in self.models
            for source in self.spec.datasets
            if source.models is None or model.name in source.models
        ]

    def sampling(self, source: Source) -> Sampling:
        """Return how tokens are chosen on a dataset; where its problems say how many at most, that is still to come."""
        named = ("max_new_tokens", "temperature", "top_p")
        given = {name: value for name in named if (value := getattr(source, name)) is not None}
        return self.spec.sampling.model_copy(update=given)

    def reference_runs(self) -> list[Run]:
        """Return the runs of the full cache, which come first: budgets and teachers are taken from them."""
        digest = digest_of(self.reference.policy)
        return [
            run
            for model, source in self.places()
            if source.generates
            for run in self._runs("generate", model, source, self.reference.policy, digest, {})
        ]

    def traces(self, lengths: Mapping[tuple[str, str], Sequence[int]]) -> dict[tuple[str, str], float]:
        """Return the mean number of tokens that the full cache sees, per (model, dataset).

        Args:
            lengths: prompt and answer together, of every problem that the full cache answered.
        """
        found = {place: sum(values) / len(values) for place, values in lengths.items() if values}
        for model, source in self.places():
            if not source.generates:
                problems = self.problems(model, source)[self.seeds(source)[0]]
                found[model.name, source.label] = sum(p.cut[1] for p in problems) / len(problems)
        return found

    def cells(self, traces: Mapping[tuple[str, str], float]) -> list[Cell]:
        """Return every variant on every dataset with every model, the full cache first."""
        cells = []
        for model, source in self.places():
            trace = traces.get((model.name, source.label))
            cells += [self._cell(variant, model.name, source, trace) for variant in (self.reference, *self.variants)]
        return cells

    def _cell(self, variant: Variant, model: str, source: Source, trace: float | None) -> Cell:
        dataset = source.label
        try:
            policy = variant.resolved(trace)
            if source.budget is not None and variant is not self.reference:
                policy = policy.replace("budget", {"tokens": source.budget})
        except SpecError as error:
            stands_for = _hash([identity(variant.policy), str(variant.trace), model, dataset])[:16]
            return Cell(variant, model, dataset, None, stands_for, str(error))
        return Cell(variant, model, dataset, policy, digest_of(policy))

    def asked(self, cells: Sequence[Cell], teachers: Mapping[str, tuple[int, ...]]) -> list[list[Run]]:
        """Return the runs that each cell's numbers are made of; none for cells that are not possible.

        Args:
            cells: what `cells` returned.
            teachers: answers of the full cache by the key of the run that gave them; what they are needed for and are
                not among them is left out.
        """
        models = {model.name: model for model in self.models}
        sources = {source.label: source for source in self.spec.datasets}
        asked: list[list[Run]] = []
        for cell in cells:
            source = sources[cell.dataset]
            # Where the full cache answers on its own, its divergence from itself is not measured.
            wanted = kinds(source)[:1] if cell.variant is self.reference else kinds(source)
            asked.append(
                []
                if cell.policy is None
                else [
                    run
                    for kind in wanted
                    for run in self._runs(
                        kind, models[cell.model], source, cell.policy, cell.digest, teachers, cell.variant.compress
                    )
                ]
            )
        return asked

    def beside_reference(self, cells: Sequence[Cell], asked: Sequence[Sequence[Run]]) -> list[Run]:
        """Return the runs that `asked` returned for these cells, each once, without those of `reference_runs`."""
        found: dict[str, Run] = {}
        for cell, runs in zip(cells, asked, strict=True):
            for run in runs:
                if cell.variant is not self.reference or run.kind != "generate":
                    found[run.key] = run
        return list(found.values())

    def _runs(
        self,
        kind: RunKind,
        model: ModelRef,
        source: Source,
        policy: PolicySpec,
        digest: str,
        teachers: Mapping[str, tuple[int, ...]],
        compress: Compress | None = None,
    ) -> Iterator[Run]:
        sampling = self.sampling(source)
        samples = source.generates and not sampling.greedy
        varies = samples or has_seed(policy)
        attention = kind == "force" and "attention_mass" in self.spec.metrics
        of_seed, seeds = self.problems(model, source), self.seeds(source)
        full = self.reference.policy
        reference = digest_of(full)
        code, full_code = self._code(policy, digest), self._code(full, reference)
        for seed in seeds if varies or source.fresh_by_seed else seeds[:1]:
            seeded = with_seed(policy, seed)
            # A later seed may have none left.
            for problem in of_seed[seed if source.fresh_by_seed else seeds[0]]:
                chosen = sampling
                if problem.most_tokens is not None and source.max_new_tokens is None:
                    chosen = sampling.model_copy(update={"max_new_tokens": problem.most_tokens})
                shared = keys.common(model, problem, seed if varies else None, policy, digest, code, compress)
                teacher: tuple[int, ...] = ()
                if kind == "force" and source.generates:
                    read = keys.common(model, problem, seed if samples else None, full, reference, full_code)
                    answered = keys.key_of(keys.generated(read, chosen))
                    if answered not in teachers:  # the full cache failed on it, which is recorded there
                        continue
                    teacher = teachers[answered]
                generates = kind == "generate"
                made_of = (
                    keys.generated(shared, chosen) if generates else keys.forced(shared, teacher, attention=attention)
                )
                yield Run(
                    made_of, kind, model, source.label, problem, seed, digest, seeded, chosen, teacher, attention,
                    compress,
                )  # fmt: skip

    def _code(self, policy: PolicySpec, digest: str) -> str:
        if digest not in self._code_of:
            self._code_of[digest] = self._codes.of(policy)
        return self._code_of[digest]


def _check_contexts(source: Source, problems: Sequence[Problem]) -> None:
    if not all(problem.context for problem in problems):
        raise KVPolicyError(
            f"datasets: {source.label} has no context apart from its questions, so that `compress: context` cannot be "
            "done; write `compress: prompt`, or give another dataset."
        )


def tasks_of(runs: Iterable[Run], batch: int, threads: int | None) -> list[tuple[Task, list[Run]]]:
    """Put runs that can go together into batches, in an order in which all variants advance together.

    Args:
        runs: in any order.
        batch: most runs of a task.
        threads: threads of torch in a worker.
    """
    groups: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        # A policy that the seed changes is another object for each seed.
        alike = run.attention, run.compress, run.sampling
        groups[run.kind, run.model, run.dataset, run.digest, id(run.policy), *alike].append(run)
    made: list[tuple[int, Task, list[Run]]] = []
    for members in groups.values():
        members.sort(key=lambda run: (run.seed, run.problem.index))
        for number, start in enumerate(range(0, len(members), batch)):
            part = members[start : start + batch]
            first = part[0]
            items = tuple(Item(run.problem, run.seed, run.teacher) for run in part)
            data = first.policy.to_data()
            task = Task(first.kind, first.model, data, items, first.sampling, first.attention, threads, first.compress)
            made.append((number, task, part))
    # Models do not alternate, for a worker keeps one in memory.
    order = list(dict.fromkeys(task.model for _, task, _ in made))
    made.sort(key=lambda each: (order.index(each[1].model), each[0]))
    return [(task, part) for _, task, part in made]


def has_seed(policy: PolicySpec) -> bool:
    """Return whether some component draws random numbers."""
    return with_seed(policy, 1) != policy


def with_seed(policy: PolicySpec, seed: int) -> PolicySpec:
    """Return the policy with `seed` added to the seed of every component that has one."""
    data = policy.to_data()
    changed = {name: _seeded(value, seed) for name, value in data.items()}
    return policy if changed == data else PolicySpec(**changed)


def _seeded(value: Any, seed: int) -> Any:
    if isinstance(value, dict):
        return {
            key: item + seed if key == "seed" and isinstance(item, int) else _seeded(item, seed)
            for key, item in value.items()
        }
    return [_seeded(item, seed) for item in value] if isinstance(value, list) else value


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:40]
