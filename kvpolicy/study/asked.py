"""What a study asks for: the only runs that any of its numbers is made of. And what else is in its file."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Self

from kvpolicy.study import keys
from kvpolicy.study.records import CellRecord, Recorded, cell_record, model_data
from kvpolicy.study.results import Results
from kvpolicy.study.runs import Cell, Plan, Run

_NAMED: Final = 4  # reasons that a sentence names
_LOOKED_AT: Final = 20  # runs that an older one is compared with, to say why it is older


@dataclass(frozen=True)
class Asked:
    """What a study asks for.

    Attributes:
        study: its fields, as plain values.
        models: what identifies each of its models.
        cells: every variant in every place, with the keys of its runs.
        documents: what its runs depend on, by key, as far as it is known without the file.
    """

    study: Mapping[str, Any]
    models: Sequence[Mapping[str, Any]]
    cells: Sequence[CellRecord]
    documents: Mapping[str, keys.Document] = field(default_factory=dict)

    @classmethod
    def last(cls, results: Recorded) -> Self:
        """Return what the study asked for when it ran last; nothing of it need be installed. Raises ResultsError."""
        return cls(results.study(), results.models(), results.cells())

    @classmethod
    def now(cls, plan: Plan, results: Results) -> Self:
        """Return what the study asks for as it is now, as far as the full cache has run; the file stays as it is."""
        cells = cells_so_far(plan, results)
        return cls.of(plan, cells, plan.asked(cells, results.teachers()))

    @classmethod
    def of(cls, plan: Plan, cells: Sequence[Cell], runs: Sequence[Sequence[Run]]) -> Self:
        """Return what a plan asks for.

        Args:
            plan: the study.
            cells: of `cells_so_far`.
            runs: what `Plan.asked` returned for them.
        """
        noted = [cell_record(cell, found) for cell, found in zip(cells, runs, strict=True)]
        documents = {run.key: run.document for found in runs for run in found}
        return cls(plan.spec.to_data(), [model_data(model) for model in plan.models], noted, documents)

    @cached_property
    def keys(self) -> frozenset[str]:
        """The keys of all its runs."""
        return frozenset(key for cell in self.cells for key in cell.keys)

    def older(self, results: Recorded) -> Older:
        """Return what is in the file and not asked for."""
        here = {record.key: record.document for record in results.records(outputs=False)}
        wanted = [*self.documents.values()] or [document for key, document in here.items() if key in self.keys]
        near: dict[tuple[Any, ...], list[keys.Document]] = defaultdict(list)
        for document in wanted:
            for place in _places(document):
                near[place].append(document)
        gone = {key: document for key, document in here.items() if key not in self.keys}
        reasons = Counter(
            _reason(document, next((near[place] for place in _places(document) if place in near), wanted))
            for document in gone.values()
        )
        return Older(frozenset(gone), reasons)


@dataclass(frozen=True)
class Older:
    """Runs of a file that the study does not ask for: of other settings, or of what has been taken out of it.

    Attributes:
        keys: their keys.
        reasons: what they differ in -> how many of them.
    """

    keys: frozenset[str]
    reasons: Mapping[str, int]

    def __str__(self) -> str:
        """A sentence without its full stop; empty if there are none."""
        count = len(self.keys)
        if not count:
            return ""
        ordered = sorted(self.reasons.items(), key=lambda each: (-each[1], each[0]))
        named = [f"{number:,} of {reason}" for reason, number in ordered[:_NAMED]]
        rest = sum(number for _, number in ordered[_NAMED:])
        named += [f"{rest:,} of others"] if rest else []
        runs, are = ("run", "is") if count == 1 else ("runs", "are")
        return f"{count:,} older {runs} of other settings {are} in the file and not counted ({', '.join(named)})"


def cells_so_far(plan: Plan, results: Results) -> list[Cell]:
    """Return the variants with their budgets, as far as the full cache has run.

    A budget that is not known yet is no error; it is one when the full cache has failed on every problem.
    """
    reference = plan.reference_runs()
    found = results.lengths(run.key for run in reference)
    failed = results.finished(failed=True)
    lengths: dict[tuple[str, str], list[int]] = defaultdict(list)
    waiting = set()
    for run in reference:
        if run.key in found:
            lengths[run.model.name, run.dataset].append(found[run.key])
        elif run.key not in failed:
            waiting.add((run.model.name, run.dataset))
    unknown = waiting - lengths.keys()
    return [
        replace(cell, error=None) if cell.variant.trace is not None and (cell.model, cell.dataset) in unknown else cell
        for cell in plan.cells(plan.traces(lengths))
    ]


def _places(document: keys.Document) -> Iterator[tuple[Any, ...]]:
    """Yield where runs stand that may differ in little: the same policy on the same problem, or on others."""
    place = tuple(document.get(name) for name in ("model", "dataset", "kind", "policy"))
    yield (*place, document.get("number"))
    yield place


def _reason(document: keys.Document, wanted: Sequence[keys.Document]) -> str:
    """Return what a run differs in from the one among those wanted that it is most alike."""
    fewest: list[str] | None = None
    for other in wanted[:_LOOKED_AT]:
        fields = [name for name in keys.WORDS if document.get(name) != other.get(name)]
        if fewest is None or len(fields) < len(fewest):
            fewest = fields
        if len(fields) <= 1:
            break
    return keys.WORDS[fewest[0]] if fewest else "other settings"
