"""The numbers of a study without its texts: a small file to publish, from which its report is made again.

It is JSON, compressed by gzip, and holds what a study asks for and what each of its runs gave; texts that were
generated, tokens and the keys of runs are left out. Numbers have seven digits.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NotRequired

from pydantic import Field, JsonValue, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from kvpolicy.inputs import require_ordinary
from kvpolicy.loading.entries import POLICY_NAME
from kvpolicy.odd_text import odd_character
from kvpolicy.study import records
from kvpolicy.study.metrics import RunKind
from kvpolicy.study.portable import short_command, short_paths, with_short_paths
from kvpolicy.study.records import CellRecord, Recorded, RunRecord
from kvpolicy.study.results import ResultsError

if TYPE_CHECKING:
    from kvpolicy.study.asked import Asked

SUFFIX: Final = ".json.gz"
VERSION: Final = 2

_MOST_BYTES: Final = 1 << 28
_MOST_RUNS: Final = 1_000_000  # of all variants together
_LONGEST_PROMPT: Final = 4_000  # characters
_DIGITS: Final = 7

_Text = Annotated[str, Field(max_length=4096)]
_StudyName = Annotated[str, Field(pattern=rf"^{POLICY_NAME.pattern}$")]  # files are called by it
_Natural = Annotated[int, Field(ge=0, lt=1 << 53)]
_Second = Annotated[int, Field(ge=0, le=records.LAST_SECOND)]
_Stretch = tuple[Annotated[int, Field(ge=-1, lt=1 << 53)], Annotated[int, Field(ge=1, lt=1 << 53)]]
_Number = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]


class _PublishedCell(TypedDict):
    """A variant in one place.

    `runs` are stretches [first, count] of the file's runs, counted through; first is -1 for runs that are missing. The
    policy alone does not say which they are: what is compressed may differ, too.
    """

    name: _Text
    condition: _Text
    settings: dict[_Text, _Text]
    model: _Text
    dataset: _Text
    policy: str | None
    digest: _Text
    error: str | None
    data: dict[str, JsonValue]
    runs: list[_Stretch]
    keys: _Text


class _PublishedProblem(TypedDict):
    content: _Text
    prompt: str
    answer: str
    task: NotRequired[_Text]


class _PublishedRuns(TypedDict):
    """Runs of one policy in one place: lists with a value for each run."""

    model: _Text
    dataset: _Text
    digest: _Text
    kind: RunKind
    problem: list[_Natural]
    content: list[_Natural]
    seed: list[_Natural]
    environment: list[_Natural]
    prompt_tokens: list[_Natural]
    finished: list[_Second]
    errors: dict[_Text, str]
    metrics: dict[_Text, list[_Number | None]]


class _PublishedStudy(TypedDict):
    kvpolicy_results: int
    study: _StudyName
    command: _Text
    spec: records.StudyData
    models: list[dict[str, _Text | None]]
    environments: dict[_Text, dict[str, _Text | None]]
    problems: list[_PublishedProblem]
    cells: list[_PublishedCell]
    runs: list[_PublishedRuns]


_DOCUMENT: Final = TypeAdapter(_PublishedStudy)


def published(results: Recorded, asked: Asked, command: str) -> bytes:
    """Return the file: the runs that a study asks for, as far as they are recorded; the same bytes for the same runs.

    Args:
        results: what was recorded.
        asked: what the study asks for.
        command: the command that ran the study.
    """
    counted = results.records(asked.keys, outputs=False)
    texts = results.problems()
    tasks = {_content(record): str(record.document.get("task") or "") for record in counted}
    contents = list(tasks)
    place = {content: i for i, content in enumerate(contents)}
    used = {record.environment for record in counted}
    groups = list(_grouped(counted).values())
    short = short_paths(asked.study, (cell.policy for cell in asked.cells))
    number = {record.key: i for i, record in enumerate(record for members in groups for record in members)}
    document = {
        "kvpolicy_results": VERSION,
        "study": results.meta("study") or "study",
        "command": short_command(command, short),
        "spec": with_short_paths(asked.study, short),
        "models": with_short_paths(asked.models, short),
        "environments": {str(n): data for n, data in sorted(results.environments().items()) if n in used},
        "problems": [_problem(content, *texts.get(content, ("", "")), task) for content, task in tasks.items()],
        "cells": [with_short_paths(_cell(cell, number), short) for cell in asked.cells],
        "runs": [_group(members, place, short) for members in groups],
    }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    return gzip.compress(text.encode("utf-8", "backslashreplace"), 9, mtime=0)


def _content(record: RunRecord) -> str:
    return str(record.document.get("content"))


def _problem(content: str, prompt: str, answer: str, task: str) -> dict[str, str]:
    short = prompt if len(prompt) <= _LONGEST_PROMPT else f"{prompt[: _LONGEST_PROMPT - 1]}…"
    return {"content": content, "prompt": short, "answer": answer, **({"task": task} if task else {})}


def _stretches(numbers: Iterable[int]) -> list[list[int]]:
    """Return numbers as [first, count], each stretch counting up by one; -1 stands for one that is missing."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == (-1 if found[-1][0] == -1 else sum(found[-1])):
            found[-1][1] += 1
        else:
            found.append([number, 1])
    return found


def _cell(cell: CellRecord, number: Mapping[str, int]) -> dict[str, Any]:
    fields = ("name", "condition", "settings", "model", "dataset", "policy", "digest", "error", "data")
    keys = hashlib.sha256("".join(cell.keys).encode()).hexdigest()[:40]
    return {
        **{name: getattr(cell, name) for name in fields},
        "runs": _stretches(number.get(key, -1) for key in cell.keys),
        "keys": keys,
    }


def _grouped(counted: Sequence[RunRecord]) -> dict[tuple[str, ...], list[RunRecord]]:
    found: dict[tuple[str, ...], list[RunRecord]] = defaultdict(list)
    for record in counted:
        found[record.model, record.dataset, record.digest, record.kind].append(record)
    return found


def _group(members: Sequence[RunRecord], place: dict[str, int], short: Mapping[str, str]) -> dict[str, Any]:
    first = {name: getattr(members[0], name) for name in ("model", "dataset", "digest", "kind")}
    errors = {str(i): record.error for i, record in enumerate(members) if record.error is not None}
    names = sorted({name for record in members for name in record.metrics})
    return {
        **with_short_paths(first, short),
        **{name: [getattr(r, name) for r in members] for name in ("problem", "seed", "environment", "prompt_tokens")},
        "content": [place[_content(record)] for record in members],
        "finished": [int(record.finished) for record in members],
        "errors": with_short_paths(errors, short),
        "metrics": {name: [_short(record.metrics.get(name)) for record in members] for name in names},
    }


def _short(value: float | None) -> float | int | None:
    if value is None:
        return None
    rounded = float(f"{value:.{_DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1 << 53 else rounded


class Published:
    """A published file, read as results are; it is of the study as it ran then.

    Args:
        path: the file.

    Raises:
        ResultsError: there is no such file, or it is another one, of another version, or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._document = self._read()
        self._records = list(self._runs())
        if sum(count for cell in self._document["cells"] for _, count in cell["runs"]) > _MOST_RUNS:
            raise self._wrong(f"its variants have more than {_MOST_RUNS:,} runs")
        self._cells = [self._cell(cell) for cell in self._document["cells"]]

    def _read(self) -> _PublishedStudy:
        if not self.path.is_file():
            raise ResultsError(f"{self.path}: there is no such file; name one that `kvpolicy study report` published.")
        require_ordinary(self.path, "results file", error=ResultsError)
        if self.path.stat().st_size > _MOST_BYTES:
            raise self._wrong(f"it has more than {_MOST_BYTES >> 20} MiB")
        reader = zlib.decompressobj(wbits=31)
        try:
            raw = reader.decompress(self.path.read_bytes(), _MOST_BYTES)
        except zlib.error:
            raise self._wrong("it is not compressed by gzip") from None
        if not reader.eof:
            raise self._wrong(f"it is cut off, or has more than {_MOST_BYTES >> 20} MiB")
        try:
            found: _PublishedStudy = _DOCUMENT.validate_json(raw, strict=True)
        except ValidationError as error:
            detail = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in detail["loc"])[:60] or "at the top"
            raise self._wrong(f"{where}: {detail['msg']}") from None
        if found["kvpolicy_results"] != VERSION:
            raise ResultsError(
                f"{self.path}: is of version {found['kvpolicy_results']}, and this kvpolicy reads version {VERSION}; "
                "use the kvpolicy that wrote it."
            )
        shown = [found["command"], *(problem.get("task", "") for problem in found["problems"])]
        for cell in found["cells"]:
            shown += [cell["name"], cell["condition"], cell["model"], cell["dataset"], cell["digest"]]
            shown += [*cell["settings"], *cell["settings"].values()]
        if any(odd_character(text) is not None for text in shown):
            raise self._wrong("a name in it has characters that names cannot have")
        return found

    def _runs(self) -> Iterator[RunRecord]:
        documents = [
            {name: value for name, value in problem.items() if name in ("content", "task")}
            for problem in self._document["problems"]
        ]
        for g, group in enumerate(self._document["runs"]):
            columns = ("problem", "content", "seed", "environment", "prompt_tokens", "finished")
            count = len(group["problem"])
            lists: list[Sequence[Any]] = [group[name] for name in columns]  # type: ignore[literal-required]
            if any(len(each) != count for each in (*lists, *group["metrics"].values())):
                raise self._wrong("the columns of its runs are not of one length")
            if any(i >= len(documents) for i in group["content"]):
                raise self._wrong("a run in it is of a problem that is not there")
            for i, (problem, content, seed, made_with, prompt_tokens, finished) in enumerate(zip(*lists, strict=True)):
                metrics = {name: values[i] for name, values in group["metrics"].items()}
                numbers = {name: float(value) for name, value in metrics.items() if value is not None}
                if (wrong := records.wrong_metric(numbers)) is not None:
                    raise self._wrong(f"a run in it has numbers that cannot be: {wrong}")
                yield RunRecord(
                    *(f"{g}-{i}", group["kind"], group["model"], group["dataset"], problem, seed, group["digest"]),
                    *(group["errors"].get(str(i)), numbers, prompt_tokens),
                    document=documents[content],
                    environment=made_with,
                    finished=float(finished),
                )

    def _cell(self, cell: _PublishedCell) -> CellRecord:
        place, keys = (cell["model"], cell["dataset"], cell["digest"]), list[str]()
        for first, count in cell["runs"]:
            if first == -1:
                keys += ("missing " + " ".join((*place, str(len(keys) + i))) for i in range(count))
                continue
            runs = self._records[first : first + count]
            if len(runs) != count or any((run.model, run.dataset, run.digest) != place for run in runs):
                raise self._wrong("a variant in it is of runs that are not there, or not its own")
            keys += (run.key for run in runs)
        fields = {name: value for name, value in cell.items() if name not in ("runs", "keys")}
        return CellRecord(**fields, keys=tuple(keys))  # type: ignore[arg-type]

    def _wrong(self, reason: str) -> ResultsError:
        return ResultsError(
            f"{self.path}: is not a published file of a study ({reason}); take a copy as it was written."
        )

    def meta(self, name: str) -> str | None:
        """Return the name of the study, or the command that ran it."""
        return {"study": self._document["study"], "command": self._document["command"]}.get(name)

    def study(self) -> records.StudyData:
        """Return the fields of the study."""
        return self._document["spec"]

    def models(self) -> list[dict[str, str | None]]:
        """Return its models."""
        return self._document["models"]

    def cells(self) -> list[CellRecord]:
        """Return what the study asked for, the full cache first; keys name runs in this file alone."""
        return self._cells

    def records(self, keys: Collection[str] | None = None, *, outputs: bool = True) -> list[RunRecord]:
        """Return runs; none has its text.

        Args:
            keys: of which runs; all if None.
            outputs: changes nothing.
        """
        return [record for record in self._records if keys is None or record.key in keys]

    def problems(self) -> dict[str, tuple[str, str]]:
        """Return (prompt, answer) by the digest of a problem's content; long prompts are cut."""
        return {each["content"]: (each["prompt"], each["answer"]) for each in self._document["problems"]}

    def environments(self) -> dict[int, dict[str, str | None]]:
        """Return versions and machines that runs were made with, by number."""
        return {int(number): data for number, data in self._document["environments"].items() if number.isdecimal()}
