"""Everything that a study's numbers depend on, as a report lists it."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

import kvpolicy
from kvpolicy.odd_text import harmless
from kvpolicy.spec import yaml_text
from kvpolicy.study.asked import Asked
from kvpolicy.study.portable import short_paths, with_short_paths
from kvpolicy.study.records import CellRecord, Recorded, RunRecord

_EXCERPT: Final = 160
_FACTS: Final = (
    "design",
    "compare_to",
    "models",
    "datasets",
    "samples",
    "seeds",
    "sampling",
    "compress",
    "metrics",
    "batch",
    "dtype",
)


@dataclass(frozen=True)
class PolicyFile:
    """A policy as it ran.

    Attributes:
        places: conditions and datasets that it ran in.
        text: the policy in full, as YAML; None if it is not possible.
        error: why it is not possible.
    """

    places: tuple[str, ...]
    text: str | None
    error: str | None


@dataclass(frozen=True)
class ShownProblem:
    """What the model was given.

    Attributes:
        number: in the dataset.
        prompt: its beginning.
        answer: the right answer; empty for free text.
    """

    number: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class Measured:
    """When and on what the counted runs were made.

    Attributes:
        first, last: days of the first and the last one (UTC), such as ``2026-11-30``; empty if they are not known.
        seconds: computing time of all of them together, whatever ran side by side; None if it was not measured.
        machines: names of processors, and of accelerators.
    """

    first: str
    last: str
    seconds: float | None
    machines: tuple[str, ...]


@dataclass(frozen=True)
class StudySettings:
    """Everything that a study's numbers depend on.

    Attributes:
        study: the study file as it ran, files of datasets by folder and name only; empty if it is not recorded.
        facts: its most important fields, name -> value as text.
        axes: the paths that are compared.
        models: name, fingerprint, revision, dtype and device of each model, as far as they are recorded.
        environments: name -> value for each set of versions that counted runs were made with; `runs` says how many.
        policies: variant -> its policies, one for each budget and condition in which they differ.
        problems: dataset -> its problems.
        version: of the kvpolicy that made the report.
        measured: when and on what they were made.
    """

    study: str
    facts: Mapping[str, str]
    axes: tuple[str, ...]
    models: tuple[Mapping[str, Any], ...]
    environments: tuple[Mapping[str, Any], ...]
    policies: Mapping[str, tuple[PolicyFile, ...]]
    problems: Mapping[str, tuple[ShownProblem, ...]]
    version: str
    measured: Measured

    @property
    def environment_names(self) -> tuple[str, ...]:
        """What is known of the environments, in order; an older one may lack some of it."""
        return tuple(dict.fromkeys(name for each in self.environments for name in each))


def settings(results: Recorded, asked: Asked) -> StudySettings:
    """Return the settings of a study.

    Args:
        results: the results file.
        asked: what the study asks for.
    """
    short = short_paths(asked.study, (cell.policy for cell in asked.cells))
    data = with_short_paths(asked.study, short)
    counted = results.records(asked.keys, outputs=False)
    made, versions = Counter(record.environment for record in counted), results.environments()
    models = asked.models or [{"name": name} for name in data.get("models", ())]
    # What a study file leaves out is left out here too.
    text = yaml_text.write({name: value for name, value in data.items() if value not in (None, "", [], {})})
    return StudySettings(
        study=text if data else "",
        facts={name: _text(data[name]) for name in _FACTS if data.get(name) not in (None, [])},
        axes=tuple(data.get("axes") or ()),
        models=tuple(models),
        environments=tuple(
            {**versions.get(number, {}), "runs": f"{count:,}"} for number, count in sorted(made.items())
        ),
        policies=_policies([replace(cell, policy=with_short_paths(cell.policy, short)) for cell in asked.cells]),
        problems=_problems(counted, results),
        version=kvpolicy.__version__,
        measured=_measured(counted, [versions.get(number, {}) for number in made]),
    )


def _measured(counted: Sequence[RunRecord], versions: Sequence[Mapping[str, str | None]]) -> Measured:
    times = [record.finished for record in counted if record.finished]
    first, last = (
        (datetime.fromtimestamp(end, tz=UTC).date().isoformat() for end in (min(times), max(times)))
        if times
        else ("", "")
    )
    seconds = [record.metrics["seconds"] for record in counted if "seconds" in record.metrics]
    machines = dict.fromkeys(
        machine for each in versions for name in ("processor", "accelerator") if (machine := each.get(name))
    )
    return Measured(first, last, math.fsum(seconds) if seconds else None, tuple(machines))


def _problems(counted: Sequence[RunRecord], results: Recorded) -> dict[str, tuple[ShownProblem, ...]]:
    """Return what the counted runs were given, dataset by dataset."""
    known = results.problems()
    found: dict[str, dict[int, ShownProblem]] = defaultdict(dict)
    for record in counted:
        prompt, answer = known.get(str(record.document.get("content")), ("", ""))
        found[record.dataset][record.problem] = ShownProblem(record.problem, _excerpt(prompt), harmless(answer))
    return {dataset: tuple(each for _, each in sorted(of.items())) for dataset, of in sorted(found.items())}


def _policies(cells: Sequence[CellRecord]) -> dict[str, tuple[PolicyFile, ...]]:
    """Return the policies by variant; what is the same in several places is there once."""
    several = len({cell.model for cell in cells}) > 1
    found: dict[str, dict[tuple[str | None, str | None], list[str]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        place = " · ".join(filter(None, (cell.condition, cell.dataset, cell.model if several else "")))
        found[cell.name][cell.policy, cell.error].append(place)
    return {
        name: tuple(PolicyFile(tuple(places), text, error) for (text, error), places in files.items())
        for name, files in found.items()
    }


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ("; " if any(isinstance(item, Mapping) for item in value) else ", ").join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def _excerpt(prompt: str) -> str:
    line = harmless(" ".join(prompt.split()))
    return line if len(line) <= _EXCERPT else f"{line[: _EXCERPT - 1]}…"
