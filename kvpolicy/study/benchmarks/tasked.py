"""Benchmarks of several tasks, each in a file of its own."""

from __future__ import annotations

import itertools
import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

from pydantic import Field, model_validator

from kvpolicy.contracts.component import LONGEST_TEXT
from kvpolicy.errors import KVPolicyError, did_you_mean
from kvpolicy.study.benchmarks.prompts import labelled, require_published
from kvpolicy.study.dataset_rows import existing, hub_file
from kvpolicy.study.json_rows import JsonRows
from kvpolicy.study.problem import Problem
from kvpolicy.study.source import Source, TextMeasure

ENDINGS: Final = (".jsonl", ".json")

MOST_PARTS: Final = 1_000
"""Questions about one text."""


class TaskedSource(Source):
    """Problems of several tasks, in turn: the first of each task, then the second of each, and so on.

    Attributes:
        use: its name in studies.
        known: its tasks, in the authors' order.
        columns: the fields that a row of every task has.
        archive: the file on the hub that holds the files of all tasks; None if they lie there as they are.
        folder: where on the hub they lie.
    """

    measured: ClassVar[bool] = True
    use: ClassVar[str]
    known: ClassVar[Sequence[str]]
    columns: ClassVar[Sequence[str]]
    archive: ClassVar[str | None] = None
    folder: ClassVar[str] = ""

    tasks: list[str] | None = Field(default=None, min_length=1)
    """Which tasks; all of them if left out."""
    path: str | None = None
    """A folder with a local copy, TASK.jsonl of each task, or the file of the only task; the hub if left out."""
    id: str
    """Its id on the hub."""
    revision: str | None = None
    """Commit or tag; the newest if left out."""
    chat: bool | None = None
    """Whether the tokenizer's chat template is applied; as its authors do if left out."""
    truncate: int | None = Field(default=None, ge=2, le=LONGEST_TEXT)
    """Most tokens of a prompt, of which the middle is left out; what the model takes if left out."""

    @model_validator(mode="after")
    def _known(self) -> TaskedSource:
        for task in self.tasks or ():
            if task not in self.known:
                raise ValueError(
                    f"there is no task {task!r}.{did_you_mean(task, self.known)} Tasks: {', '.join(self.known)}"
                )
        if len(set(self.tasks or ())) < len(self.tasks or ()):
            raise ValueError("a task is there twice; name it once")
        return self

    @property
    def chosen(self) -> tuple[str, ...]:
        """The tasks that are asked for, in the authors' order."""
        return tuple(task for task in self.known if self.tasks is None or task in self.tasks)

    def _label(self) -> str:
        return labelled(self.use, self.known, self.chosen)

    def problems(self, count: int, seed: int, measure: TextMeasure | None = None) -> list[Problem]:
        """Return `count` problems; those of a task are in an order that is shuffled, but always the same.

        A problem's number is made of the number of its row, of its place in the row, and of its task.
        """
        share = -(-count // len(self.chosen))
        of_task = [list(itertools.islice(self._of_task(task, measure), share)) for task in self.chosen]
        turns = itertools.zip_longest(*of_task)
        return [problem for turn in turns for problem in turn if problem is not None][:count]

    def _of_task(self, task: str, measure: TextMeasure | None) -> Iterator[Problem]:
        at = self.known.index(task)
        for row, part, fields, where in self._parts_of_rows(task):
            problem = self._problem(task, fields, part, where, measure)
            number = (row * MOST_PARTS + part) * len(self.known) + at
            yield replace(problem, dataset=self.label, index=number, task=task)

    def _parts_of_rows(self, task: str) -> Iterator[tuple[int, int, Mapping[str, Any], str]]:
        """Yield row, part, fields and place: the first parts of all rows, then the second ones, and so on."""
        found: list[tuple[int, Mapping[str, Any], str, int]] = []
        with self._rows(task) as rows:
            order = list(range(len(rows)))
            random.Random(0).shuffle(order)  # noqa: S311 - a sample, not a secret
            for row in order:
                fields, where = rows.fields(row), rows.place(row)
                require_published(list(fields), self.columns, where, f"{self.use}, {task},")
                parts = self._parts(task, fields, where)
                if not 0 <= parts <= MOST_PARTS:
                    raise KVPolicyError(f"datasets: {where} has {parts:,} questions; at most {MOST_PARTS:,} are read.")
                found.append((row, fields, where, parts))
                if parts:
                    yield row, 0, fields, where
        for part in range(1, max((parts for *_, parts in found), default=0)):
            yield from ((row, part, fields, where) for row, fields, where, parts in found if part < parts)

    def _rows(self, task: str) -> JsonRows:
        if self.path is not None:
            return JsonRows.of_file(self._local(task))
        if self.archive is None:
            return JsonRows.of_file(str(hub_file(self.id, f"{self.folder}{task}.jsonl", self.revision)))
        return JsonRows.of_archive(str(hub_file(self.id, self.archive, self.revision)), f"{task}.jsonl")

    def _local(self, task: str) -> str:
        assert self.path is not None
        given = Path(self.path)
        if not given.is_dir():
            if len(self.chosen) > 1 and given.exists():
                raise KVPolicyError(
                    f"datasets: {self.path} is one file, and {len(self.chosen)} tasks of {self.use} are asked for; "
                    "name "
                    "the folder with the files of all, or write `tasks: [TASK]`."
                )
            return existing(self.path)
        for ending in ENDINGS:
            if (given / f"{task}{ending}").exists():
                return existing(str(given / f"{task}{ending}"))
        raise KVPolicyError(
            f"datasets: {self.path} has no file {task}.jsonl; write `tasks` for those that it has, or complete the "
            "copy "
            f"of {self.use}."
        )

    def _parts(self, task: str, fields: Mapping[str, Any], where: str) -> int:
        """Return how many problems a row holds."""
        return 1

    @abstractmethod
    def _problem(
        self, task: str, fields: Mapping[str, Any], part: int, where: str, measure: TextMeasure | None
    ) -> Problem: ...
