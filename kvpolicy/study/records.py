"""What a results file holds, as values: finished runs, and what a study asks for."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Final, Protocol

from pydantic import Field, JsonValue, TypeAdapter

# pydantic reads the one of typing before Python 3.12 as if every field were required.
from typing_extensions import TypedDict

from kvpolicy.loading.entries import POLICY_NAME
from kvpolicy.odd_text import odd_character
from kvpolicy.study import keys, sealing
from kvpolicy.study.metrics import METRICS, RunKind
from kvpolicy.study.runs import Cell, Run
from kvpolicy.study.sealing import DamagedError, Scalar
from kvpolicy.study.work import Outcome

KEY_BYTES: Final = 20

_LARGEST: Final = 1e15
LAST_SECOND: Final = 253_402_300_799
"""Of the year 9999, in seconds since 1970: no date lies behind it."""

_Text = Annotated[str, Field(max_length=4096)]
_Natural = Annotated[int, Field(ge=0, lt=1 << 53)]


class StudyData(TypedDict, total=False):
    """The fields of a study as it ran, as plain values; policies and data sets need not be installed."""

    schema_version: int
    kind: str
    study: _Text
    description: str
    base: dict[str, JsonValue] | None
    design: _Text
    axes: dict[str, list[JsonValue]]
    conditions: dict[str, list[JsonValue]]
    exclude: list[dict[str, JsonValue]]
    compare_to: _Text | None
    models: list[_Text]
    datasets: list[dict[str, JsonValue]]
    samples: _Natural
    seeds: list[_Natural]
    sampling: dict[str, float]
    compress: _Text | None
    metrics: list[_Text]
    batch: _Natural
    dtype: _Text
    strict: bool
    quick: dict[str, JsonValue] | None


STUDY: Final = TypeAdapter(StudyData)
MODELS: Final = TypeAdapter(list[dict[str, _Text | None]])
ENVIRONMENT: Final = TypeAdapter(dict[str, _Text | None])
_SETTINGS: Final = TypeAdapter(dict[str, str])
_POLICY: Final = TypeAdapter(dict[str, JsonValue])
_METRICS: Final = TypeAdapter(dict[_Text, Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]])
_TOKENS: Final = TypeAdapter(list[_Natural])
_DOCUMENT: Final = TypeAdapter(dict[str, _Text | _Natural | float | bool | None])


_KINDS: Final[Mapping[str, Mapping[str, type]]] = {
    "meta": {"name": str, "value": str},
    "problems": {"digest": str, "prompt": str, "answer": str},
    "environments": {"id": int, "data": str},
}


@dataclass(frozen=True)
class RunRecord:
    """A finished run, as it is in the file.

    Attributes:
        key, kind, model, dataset, problem, seed, digest: as in `Run`; `problem` is the number in the dataset.
        error: why it failed, or None.
        metrics: numbers by name.
        prompt_tokens: tokens of the prompt.
        document: what the key is the hash of.
        environment: number of the versions and the machine that it was made with.
        packed: the generated text, compressed.
        finished: when, in seconds since 1970; 0 if that is not known.
    """

    key: str
    kind: RunKind
    model: str
    dataset: str
    problem: int
    seed: int
    digest: str
    error: str | None
    metrics: dict[str, float]
    prompt_tokens: int
    document: Mapping[str, Any] = field(default_factory=dict)
    environment: int = 0
    packed: bytes = field(default=b"", repr=False)
    finished: float = 0.0

    @property
    def output(self) -> str:
        """The generated text; raises DamagedError."""
        return sealing.unpack(self.packed)


@dataclass(frozen=True)
class CellRecord:
    """A variant on a dataset with a model, and the runs that its numbers are made of.

    Attributes:
        name, condition: as in `Variant`.
        settings: path -> value as text.
        model, dataset: where.
        policy: the policy in full, as YAML; None if it is not possible.
        digest: names the policy in the runs.
        error: why it is not possible.
        data: the policy in full, as plain values.
        keys: the keys of all runs that the study asks for here, finished or not.
    """

    name: str
    condition: str
    settings: dict[str, str]
    model: str
    dataset: str
    policy: str | None
    digest: str
    error: str | None
    data: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()


class Recorded(Protocol):
    """What a study asked for when it ran, and what its runs gave: a results file, or a published one."""

    def meta(self, name: str) -> str | None:
        """Return what is noted under a name, such as ``study``."""

    def study(self) -> StudyData:
        """Return the fields of the study as it ran last."""

    def models(self) -> list[dict[str, str | None]]:
        """Return its models."""

    def cells(self) -> list[CellRecord]:
        """Return what it asked for, the full cache first."""

    def records(self, keys: Collection[str] | None = None, *, outputs: bool = True) -> list[RunRecord]:
        """Return runs, those of some keys or all."""

    def problems(self) -> dict[str, tuple[str, str]]:
        """Return (prompt, answer) by the digest of a problem's content."""

    def environments(self) -> dict[int, dict[str, str | None]]:
        """Return versions and machines by number."""


RUN_COLUMNS: Final = (
    *("key", "kind", "model", "dataset", "problem", "seed", "digest", "error", "metrics", "prompt_tokens", "document"),
    *("output", "tokens", "rows", "environment", "finished"),
)
CELL_COLUMNS: Final = (
    *("position", "name", "condition", "settings", "model", "dataset", "policy", "digest", "error", "data", "keys"),
)


def cell_record(cell: Cell, runs: Sequence[Run]) -> CellRecord:
    """Return what a results file notes of a cell and of the runs that it asks for."""
    variant, policy = cell.variant, cell.policy
    return CellRecord(
        *(variant.name, variant.condition, dict(variant.settings), cell.model, cell.dataset),
        *(None if policy is None else policy.to_yaml(), cell.digest, cell.error),
        data={} if policy is None else policy.to_data(),
        keys=tuple(sorted(run.key for run in runs)),
    )


def cell_row(position: int, cell: CellRecord) -> tuple[Scalar, ...]:
    """Return a cell as a row of `CELL_COLUMNS`."""
    return (
        *(position, cell.name, cell.condition, json.dumps(cell.settings), cell.model, cell.dataset, cell.policy),
        *(cell.digest, cell.error, json.dumps(cell.data), bytes.fromhex("".join(cell.keys))),
    )


def read_cell(row: Sequence[Any]) -> CellRecord:
    """Return the cell of a row whose checksum is right; raises DamagedError."""
    _, name, condition, settings, model, dataset, policy, digest, error, data, packed = row
    texts = {"name": name, "condition": condition, "model": model, "dataset": dataset, "digest": digest}
    for column, text in {**texts, "settings": settings, "data": data}.items():
        _require(isinstance(text, str), "cells", column)
    for column, text in {"policy": policy, "error": error}.items():
        _require(text is None or isinstance(text, str), "cells", column)
    for column, text in {**texts, "settings": settings}.items():
        _require(odd_character(text) is None, "cells", column)
    _require(isinstance(packed, bytes) and len(packed) % KEY_BYTES == 0, "cells", "keys")
    whole = packed.hex()
    return CellRecord(
        *(name, condition, sealing.read_json(_SETTINGS, settings, "the settings of a variant")),
        *(model, dataset, policy, digest, error),
        data=sealing.read_json(_POLICY, data, "the policy of a variant"),
        keys=tuple(whole[i : i + 2 * KEY_BYTES] for i in range(0, len(whole), 2 * KEY_BYTES)),
    )


def run_row(
    run: Run, outcome: Outcome, *, teacher: bool, rows: int, environment: int, now: float
) -> tuple[Scalar, ...]:
    """Return a finished run as a row of `RUN_COLUMNS`; one whose metrics cannot be true has failed."""
    wrong = wrong_metric(outcome.metrics)
    if outcome.error is None and wrong is not None:
        outcome = Outcome(error=f"{wrong}; look for a damaged checkpoint, or use another dtype.")
    metrics = {} if wrong is not None else outcome.metrics
    return (
        *(run.key, run.kind, run.model.name, run.dataset, run.problem.index, run.seed, run.digest),
        *(outcome.error, json.dumps(metrics, sort_keys=True), outcome.prompt_tokens, keys.written(run.document)),
        *(sealing.pack(outcome.output), sealing.pack(json.dumps(outcome.tokens)) if teacher else None),
        *(rows, environment, now),
    )


def read_run(row: Sequence[Any], *, output: bool) -> RunRecord:
    """Return the run of a row whose checksum is right, with its text if `output`; raises DamagedError."""
    fields = dict(zip(RUN_COLUMNS, row, strict=True))
    for column in ("key", "kind", "model", "dataset", "digest", "metrics", "document"):
        _require(isinstance(fields[column], str), "runs", column)
    for column in ("problem", "seed", "prompt_tokens", "rows", "environment"):
        _require(isinstance(fields[column], int) and 0 <= fields[column] < 1 << 53, "runs", column)
    _require(isinstance(fields["finished"], float) and 0 <= fields["finished"] <= LAST_SECOND, "runs", "finished")
    _require(fields["error"] is None or isinstance(fields["error"], str), "runs", "error")
    _require(isinstance(fields["output"], bytes), "runs", "output")
    _require(fields["tokens"] is None or isinstance(fields["tokens"], bytes), "runs", "tokens")
    _require(fields["kind"] in ("generate", "force"), "runs", "kind")
    metrics = sealing.read_json(_METRICS, fields["metrics"], "the metrics of a run")
    document = sealing.read_json(_DOCUMENT, fields["document"], "what a run depends on")
    if keys.key_of(document) != fields["key"]:
        raise DamagedError("the key of a run is not that of what it depends on")
    if (wrong := wrong_metric(metrics)) is not None:
        raise DamagedError(f"a run in it has numbers that cannot be: {wrong}")
    told = {"kind": "kind", "model": "model", "dataset": "dataset", "number": "problem", "policy": "digest"}
    for name, column in told.items():
        _require(document.get(name) == fields[column], "runs", column)
    return RunRecord(
        **{name: fields[name] for name in RUN_COLUMNS[:8]},
        metrics=metrics,
        prompt_tokens=fields["prompt_tokens"],
        document=document,
        environment=fields["environment"],
        packed=fields["output"] if output else b"",
        finished=fields["finished"],
    )


def read_tokens(packed: object) -> tuple[int, ...]:
    """Return the tokens of an answer; raises DamagedError."""
    _require(isinstance(packed, bytes), "runs", "tokens")
    assert isinstance(packed, bytes)
    return tuple(sealing.read_json(_TOKENS, sealing.unpack(packed), "the tokens of an answer", sealing.MOST_BYTES))


def require_kinds(table: str, row: Sequence[Any]) -> None:
    """Raise DamagedError if a row of the small tables holds another kind of value than was written, or no name."""
    for (column, kind), value in zip(_KINDS.get(table, {}).items(), row, strict=False):
        _require(type(value) is kind, table, column)
    if table == "meta":
        name, value = row
        _require(odd_character(name) is None and odd_character(value) is None, table, "value")
        _require(name != "study" or POLICY_NAME.fullmatch(value) is not None, table, "value")  # files are called by it


def wrong_metric(metrics: Mapping[str, float]) -> str | None:
    """Return what is wrong with the numbers of a run, in words; None if they can be true."""
    for name, value in metrics.items():
        known = METRICS.get(name)
        low, high = (0.0, _LARGEST) if known is None else known.bounds
        if not low <= value <= high or (known is not None and known.binary and value not in (0, 1)):
            return f"{name[:40]} is {value:.6g}, which cannot be"
    return None


def model_data(model: Any) -> dict[str, str | None]:
    """Return what is noted of a model, the same on any machine: what identifies it, and how many positions it has."""
    values = {name: value for name, value in asdict(model).items() if name != "place"}
    return {name: None if value is None else str(value) for name, value in values.items()}


def _require(holds: bool, table: str, column: str) -> None:
    if not holds:
        raise DamagedError(f"the column `{column}` of its table `{table}` holds what cannot stand there")
