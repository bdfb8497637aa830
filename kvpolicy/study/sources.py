"""Where the problems of a study come from: the `datasets` entries of its file."""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvpolicy.contracts.component import LONGEST_TEXT
from kvpolicy.errors import did_you_mean
from kvpolicy.spec.problems import FieldError, from_pydantic, shown
from kvpolicy.spec.yaml_text import KeyPath
from kvpolicy.study import tasks
from kvpolicy.study.dataset_rows import column, existing, json_lines, load_rows, require_fields
from kvpolicy.study.needles import needle
from kvpolicy.study.problem import Grader, Problem
from kvpolicy.study.wording import Family

MOST_SAMPLES: Final = 100_000
"""Problems of a data set and a seed; the largest benchmarks have a tenth of it."""

BOXED: Final = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def _with_question(template: str) -> str:
    if "{question}" not in template:
        raise ValueError("should contain {question}, the place of the problem")
    return template


class Source(BaseModel):
    """One entry of `datasets`.

    Attributes:
        generates: there are answers to be generated; otherwise the text is only read (teacher forcing).
        fresh_by_seed: each seed of a study gets other problems.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
    generates: ClassVar[bool] = True
    fresh_by_seed: ClassVar[bool] = False

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """What tables call it; made from the other fields if left out."""
    samples: int | None = Field(default=None, ge=1, le=MOST_SAMPLES)
    """How many problems; the study's `samples` if left out."""
    max_new_tokens: int | None = Field(default=None, ge=1, le=LONGEST_TEXT)
    """Most tokens that are generated; that of the study's `sampling` if left out."""
    forced: bool = False
    """Also read the full cache's answers under teacher forcing (free text is always read so)."""
    models: list[str] | None = Field(default=None, min_length=1)
    """The study's models that are given it; all of them if left out."""

    @property
    def label(self) -> str:
        """The name in tables."""
        return self.name or self._label()

    @property
    def remote(self) -> str | None:
        """The id on the hub that it is read from; None for what is here."""
        return getattr(self, "id", None) if getattr(self, "path", None) is None else None

    @abstractmethod
    def _label(self) -> str: ...

    @abstractmethod
    def problems(self, count: int, seed: int) -> list[Problem]:
        """Return `count` problems, or all if there are fewer.

        Args:
            count: how many; with fewer, the first of those.
            seed: seed of the study; ignored unless `fresh_by_seed`.

        Raises:
            KVPolicyError: the data cannot be read or lack a field.
        """


class GeneratorSource(Source):
    """Synthetic reasoning problems of `kvpolicy.study.tasks`; seed s takes the s-th block of problems."""

    fresh_by_seed: ClassVar[bool] = True

    family: Family
    """prompt-recall or trace-recall."""
    level: tasks.Level = "long"
    """short, medium or long."""
    split: tasks.Split = "test"
    """development for choosing settings, test for reporting."""

    def _label(self) -> str:
        suffix = "" if self.split == "test" else f"-{self.split}"
        return f"{self.family}-{self.level}{suffix}"

    def problems(self, count: int, seed: int) -> list[Problem]:
        """Return the problems ``seed * count`` to ``(seed + 1) * count - 1`` of the level."""
        first = seed * count
        drawn = tasks.problems(self.family, self.level, self.split, count, first=first)
        return [
            Problem(
                self.label, first + i, p.prompt, p.answer, "generator", chat=False, solution=p.solution, family=p.family
            )
            for i, p in enumerate(drawn)
        ]


class NeedleSource(Source):
    """A fact hidden in a text, asked for at the end; seed s takes the s-th block of problems."""

    fresh_by_seed: ClassVar[bool] = True

    words: int = Field(default=300, ge=20, le=1_000_000)
    """About how long the text is."""
    needles: int = Field(default=1, ge=1, le=24)
    """Facts of the same form in the text, of which one is asked for."""
    chat: bool | None = None
    """Whether the tokenizer's chat template is applied; if left out, when there is one."""

    def _label(self) -> str:
        return f"needle-{self.words}" if self.needles == 1 else f"needle-{self.words}-of-{self.needles}"

    def problems(self, count: int, seed: int) -> list[Problem]:
        """Return the problems ``seed * count`` to ``(seed + 1) * count - 1``."""
        drawn = [(i, *needle(i, self.words, self.needles)) for i in range(seed * count, (seed + 1) * count)]
        return [Problem(self.label, i, prompt, answer, "number", chat=self.chat) for i, prompt, answer in drawn]


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

    def problems(self, count: int, seed: int) -> list[Problem]:
        """Return the first `count` problems of an order that is shuffled, but always the same."""
        rows = self._rows()
        require_fields(rows.column_names, {"question": self.question, "answer": self.answer}, self._where())
        order = list(range(len(rows)))
        random.Random(0).shuffle(order)  # noqa: S311 - a sample, not a secret
        grader: Grader = self.grade
        return [
            Problem(
                self.label,
                i,
                self.template.replace("{question}", str(row[self.question])),
                self._answer(str(row[self.answer])),
                grader,
                chat=self.chat,
            )
            for i, row in ((i, rows[i]) for i in order[:count])
        ]

    def _answer(self, text: str) -> str:
        return text.strip() if self.answer_after is None else text.rpartition(self.answer_after)[2].strip()


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
    """A well-known dataset whose fields are known; `path` reads them from a local JSON Lines file instead."""

    path: str | None = None
    """A local copy; the hub if left out."""

    def _where(self) -> str:
        return self.path or super()._where()

    def _rows(self) -> Any:
        return super()._rows() if self.path is None else json_lines(self.path)


class Math500Source(PresetSource):
    """MATH-500."""

    id: str = "HuggingFaceH4/MATH-500"
    question: str = "problem"

    def _label(self) -> str:
        return "math-500"


class Gsm8kSource(PresetSource):
    """GSM8K."""

    id: str = "openai/gsm8k"
    config: str | None = "main"
    answer_after: str | None = "####"

    def _label(self) -> str:
        return "gsm8k"


class Aime2024Source(PresetSource):
    """AIME 2024, I and II."""

    id: str = "HuggingFaceH4/aime_2024"
    split: str = "train"
    question: str = "problem"

    def _label(self) -> str:
        return "aime-2024"


class TextSource(Source):
    """Free text, which is read under teacher forcing."""

    generates: ClassVar[bool] = False

    path: str | list[str] | None = None
    """Text files, each a document, or JSON Lines files; relative to the study file."""
    id: str | None = None
    """Id on the hub, instead of `path`."""
    config: str | None = None
    """As for `hub`."""
    split: str = "test"
    """As for `hub`."""
    field: str = "text"
    """Field of the text, in JSON Lines and on the hub."""
    tokens: int = Field(default=1024, ge=8, le=LONGEST_TEXT)
    """Tokens of each text that are read."""
    prompt_tokens: int = Field(default=32, ge=1)
    """How many of them are given as a prompt; the rest is measured."""

    @model_validator(mode="after")
    def _one_place(self) -> TextSource:
        if (self.path is None) == (self.id is None):
            raise ValueError("give either `path` or `id`")
        if self.prompt_tokens > self.tokens - 2:
            raise ValueError("prompt_tokens should be at least 2 less than tokens")
        return self

    def _label(self) -> str:
        if self.id is not None:
            return self.id.rpartition("/")[2]
        first = self.path if isinstance(self.path, str) else (self.path or [""])[0]
        return Path(first).stem

    def problems(self, count: int, seed: int) -> list[Problem]:
        """Return the first `count` texts."""
        texts = self._texts()[:count]
        cut = (self.prompt_tokens, self.tokens)
        return [Problem(self.label, i, "", "", "none", chat=False, text=text, cut=cut) for i, text in enumerate(texts)]

    def _texts(self) -> list[str]:
        if self.id is not None:
            where = f"{self.id}, split {self.split}"
            return column(load_rows(self.id, self.config, split=self.split, where=where), self.field, where)
        texts: list[str] = []
        for path in [self.path] if isinstance(self.path, str) else self.path or []:
            if Path(path).suffix in (".jsonl", ".json"):
                texts += column(json_lines(path), self.field, path)
            else:
                rows = load_rows("text", data_files=existing(path), sample_by="document", split="train", where=path)
                texts += column(rows, "text", path)
        return texts


SOURCES: Final[Mapping[str, type[Source]]] = {
    "generator": GeneratorSource,
    "needle": NeedleSource,
    "text": TextSource,
    "jsonl": FileSource,
    "hub": HubSource,
    "math-500": Math500Source,
    "gsm8k": Gsm8kSource,
    "aime-2024": Aime2024Source,
}
"""The values of `use` in `datasets`."""


def read_source(value: Any, path: KeyPath, folder: Path | None) -> Source:
    """Return what an entry of `datasets` stands for; raises FieldError.

    Args:
        value: a name, or a mapping with `use`.
        path: where it stands.
        folder: what relative paths are relative to.
    """
    data = {"use": value} if isinstance(value, str) else value
    known = ", ".join(SOURCES)
    if isinstance(data, Source):
        return data
    if not isinstance(data, Mapping) or not isinstance(data.get("use"), str):
        raise FieldError(path, f"should be a name or {{use: name, ...}} with one of {known}, got {shown(value)}.")
    kind = SOURCES.get(data["use"])
    if kind is None:
        where = (*path, "use") if isinstance(value, Mapping) else path
        raise FieldError(
            where, f"there is no dataset {shown(data['use'])}.{did_you_mean(data['use'], SOURCES)} Known: {known}."
        )
    fields = {key: v for key, v in data.items() if key != "use"}
    for key in fields:
        if key not in kind.model_fields:
            near = did_you_mean(str(key), kind.model_fields)
            raise FieldError(
                (*path, key), f"{data['use']!r} has no such field.{near} Fields: {', '.join(kind.model_fields)}."
            )
    try:
        source = kind.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise from_pydantic(error, path, fields, repr(data["use"]), kind.model_fields) from None
    given: Any = getattr(source, "path", None)
    if folder is not None and given is not None:
        joined = str(folder / given) if isinstance(given, str) else [str(folder / each) for each in given]
        source = source.model_copy(update={"path": joined})
    return source


def source_data(source: Source) -> dict[str, Any]:
    """Return what `read_source` reads back to an equal source."""
    use = next(name for name, kind in SOURCES.items() if kind is type(source))
    return {"use": use, **source.model_dump(exclude_defaults=True)}
