"""Where the problems of a study come from: the `datasets` entries of its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from pydantic import Field, ValidationError, model_validator

from kvpolicy.contracts.component import LONGEST_TEXT
from kvpolicy.errors import KVPolicyError, did_you_mean
from kvpolicy.spec.problems import FieldError, Problems, from_pydantic, shown
from kvpolicy.spec.yaml_text import KeyPath
from kvpolicy.study import tasks
from kvpolicy.study.benchmarks import BENCHMARKS
from kvpolicy.study.dataset_rows import column, existing, json_lines, load_rows
from kvpolicy.study.needles import needle
from kvpolicy.study.problem import Problem
from kvpolicy.study.source import Source, TextMeasure
from kvpolicy.study.tables import FileSource, HubSource
from kvpolicy.study.wording import Family


class GeneratorSource(Source):
    """Synthetic reasoning problems of `kvpolicy.study.tasks`; seed s takes the s-th block of problems."""

    fresh_by_seed: ClassVar[bool] = True

    family: Family
    """prompt-recall, trace-recall or restated-recall."""
    level: tasks.Level = "long"
    """short, medium or long."""
    redundancy: tasks.Redundancy | None = None
    """How often a value is said again before it is needed: 1, 2, 4 or 8 for restated-recall, nothing for the others."""
    split: tasks.Split = "test"
    """development for choosing settings, test for reporting."""

    @model_validator(mode="after")
    def _redundancy_where_there_is_one(self) -> GeneratorSource:
        try:
            tasks.sized(self.family, self.level, self.redundancy)
        except KVPolicyError as error:
            raise ValueError(str(error).removesuffix(".")) from None
        return self

    def _label(self) -> str:
        again = "" if self.redundancy is None else f"-r{self.redundancy}"
        suffix = "" if self.split == "test" else f"-{self.split}"
        return f"{self.family}-{self.level}{again}{suffix}"

    def problems(self, count: int, seed: int, measure: TextMeasure | None = None) -> list[Problem]:
        """Return the problems ``seed * count`` to ``(seed + 1) * count - 1`` of the level."""
        first = seed * count
        drawn = tasks.problems(self.family, self.level, self.split, count, first=first, redundancy=self.redundancy)
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

    def problems(self, count: int, seed: int, measure: TextMeasure | None = None) -> list[Problem]:
        """Return the problems ``seed * count`` to ``(seed + 1) * count - 1``."""
        drawn = [(i, *needle(i, self.words, self.needles)) for i in range(seed * count, (seed + 1) * count)]
        return [
            Problem(self.label, i, text + question, answer, "number", chat=self.chat, question_at=len(text))
            for i, text, question, answer in drawn
        ]


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

    def problems(self, count: int, seed: int, measure: TextMeasure | None = None) -> list[Problem]:
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
    **BENCHMARKS,
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
            where,
            f"there is no dataset {shown(data['use'])}.{did_you_mean(data['use'], SOURCES)} Known: {known}. "
            "Anything else on the hub: {use: hub, id: OWNER/NAME, split: test, question: FIELD, answer: FIELD}.",
        )
    fields = {key: v for key, v in data.items() if key != "use"}
    listed, unknown = ", ".join(kind.model_fields), fields.keys() - kind.model_fields.keys()
    problems = Problems()
    for key in (key for key in fields if key in unknown):
        near = did_you_mean(str(key), kind.model_fields)
        problems.found.append(FieldError((*path, key), f"{data['use']!r} has no such field.{near} Fields: {listed}."))
    known_fields = {key: v for key, v in fields.items() if key not in unknown}
    try:
        source = kind.model_validate_json(json.dumps(known_fields))
    except ValidationError as error:
        for each in from_pydantic(error, path, known_fields, repr(data["use"]), kind.model_fields):
            below = each.path[len(path) :]
            is_missing = len(below) == 1 and below[0] not in known_fields
            if not (is_missing and unknown):  # what is missing may be what was misspelt
                problems.found.append(each)
    problems.check()
    for field in kind.files:
        given: Any = getattr(source, field, None)
        if folder is not None and given is not None:
            joined = str(folder / given) if isinstance(given, str) else [str(folder / each) for each in given]
            source = source.model_copy(update={field: joined})
    return source


def source_data(source: Source) -> dict[str, Any]:
    """Return what `read_source` reads back to an equal source."""
    use = next(name for name, kind in SOURCES.items() if kind is type(source))
    return {"use": use, **source.model_dump(exclude_defaults=True)}
