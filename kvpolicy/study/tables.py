"""Datasets of rows with a field for the problem and one for its answer."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator

from kvpolicy.errors import KVPolicyError
from kvpolicy.study.dataset_rows import json_lines, load_rows, local_rows, paths, require_fields, text_of, together
from kvpolicy.study.problem import Problem
from kvpolicy.study.source import Source, TextMeasure

BOXED: Final = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def _with_question(template: str) -> str:
    if "{question}" not in template:
        raise ValueError("should contain {question}, the place of the problem")
    return template


class TableSource(Source):
    """Problems in rows with named fields."""

    question: str = "question"
    """Field of the problem."""
    answer: str = "answer"
    """Field of the right answer."""
    answer_after: str | None = None
    """The answer is what follows the last of these marks in its field (GSM8K: "####")."""
    grade: Literal["math", "number", "text"] = "math"
    """math: math-verify; number: the first number of the output; text: equal but for case and blanks."""
    template: Annotated[str, AfterValidator(_with_question)] = BOXED
    """The prompt; {question} stands for the problem."""
    chat: bool | None = None
    """Whether the tokenizer's chat template is applied; if left out, when there is one."""

    @abstractmethod
    def _where(self) -> str: ...

    @abstractmethod
    def _rows(self) -> Any: ...

    def problems(self, count: int, seed: int, measure: TextMeasure | None = None) -> list[Problem]:
        """Return the first `count` problems of an order that is shuffled, but always the same."""
        rows = self._rows()
        self._check(rows.column_names)
        order = list(range(len(rows)))
        random.Random(0).shuffle(order)  # noqa: S311 - a sample, not a secret
        return [
            Problem(
                self.label,
                i,
                self.template.replace("{question}", text_of(row, self.question, i, self._where())),
                self._answer(text_of(row, self.answer, i, self._where()), i),
                self.grade,
                chat=self.chat,
            )
            for i, row in ((i, rows[i]) for i in order[:count])
        ]

    def _check(self, found: Sequence[str]) -> None:
        """Raise KVPolicyError if a field is not there."""
        require_fields(found, {"question": self.question, "answer": self.answer}, self._where())

    def _answer(self, text: str, row: int) -> str:
        if self.answer_after is None:
            return text.strip()
        if self.answer_after not in text:
            raise KVPolicyError(
                f"datasets: {self._where()}, row {row + 1}, has no {self.answer_after!r} in its field {self.answer!r}; "
                "correct `answer_after`."
            )
        return text.rpartition(self.answer_after)[2].strip()


class FileSource(TableSource):
    """A local JSON Lines file."""

    path: str
    """The file; a relative path is relative to the study file."""

    def _label(self) -> str:
        return Path(self.path).stem

    def _where(self) -> str:
        return self.path

    def _rows(self) -> Any:
        return json_lines(self.path)


class HubSource(TableSource):
    """A dataset of the Hugging Face hub, or anything else that `datasets.load_dataset` takes."""

    id: str
    """Its id on the hub."""
    config: str | None = None
    """Name of the configuration, for data sets that have several."""
    split: str = "test"
    """Name of the split."""
    revision: str | None = None
    """Commit or tag; the newest if left out."""

    def _label(self) -> str:
        return self.id.rpartition("/")[2]

    def _where(self) -> str:
        return f"{self.id}, split {self.split}"

    def _rows(self) -> Any:
        return load_rows(self.id, self.config, split=self.split, revision=self.revision, where=self._where())


class PresetSource(HubSource):
    """A well-known dataset whose fields are known; `path` reads them from a local copy instead.

    Attributes:
        use: its name in studies.
        also: further data sets of the hub that belong to it, unless another `id` is given.
    """

    use: ClassVar[str]
    also: ClassVar[tuple[str, ...]] = ()

    path: str | list[str] | None = None
    """A local copy (JSON Lines, JSON, CSV or Parquet), or several files that belong together; the hub if left out."""

    def _label(self) -> str:
        return self.use

    def _where(self) -> str:
        if self.path is None:
            return super()._where()
        return self.path if isinstance(self.path, str) else ", ".join(self.path)

    def _rows(self) -> Any:
        if self.path is not None:
            return together([local_rows(path) for path in paths(self.path)], self._where())
        ids = (self.id, *self.also) if "id" not in self.model_fields_set else (self.id,)
        loaded = [
            load_rows(each, self.config, split=self.split, revision=self.revision, where=f"{each}, split {self.split}")
            for each in ids
        ]
        return together(loaded, self._where())
