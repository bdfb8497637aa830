"""The documents and questions of RULER's two tasks of question answering: SQuAD 2.0 and HotpotQA."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvpolicy.errors import KVPolicyError
from kvpolicy.study.benchmarks.ruler_tasks import DocumentQuestion
from kvpolicy.study.dataset_rows import existing, load_rows


@dataclass(frozen=True)
class Collection:
    """Documents, and questions about them in an order that is shuffled, but always the same."""

    texts: tuple[str, ...]
    asked: tuple[DocumentQuestion, ...]


@dataclass(frozen=True)
class _Row:
    question: str
    answers: tuple[str, ...]
    needed: tuple[str, ...]
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class DocumentTask:
    """Where a task's documents come from.

    Attributes:
        id, config: on the hub, split validation.
        files: names of the published file, the one of RULER's repository first.
        of_file: reads what the file holds.
        of_rows: reads the rows of the hub.
    """

    id: str
    config: str | None
    files: tuple[str, ...]
    of_file: Callable[[Any], Iterable[_Row]]
    of_rows: Callable[[Iterable[Any]], Iterable[_Row]]


def collection(task: str, path: str | None) -> Collection:
    """Return the documents and questions of a task.

    Args:
        task: qa_1 or qa_2.
        path: a folder with the published file; None asks the hub.

    Raises:
        KVPolicyError: there is no such file, or it is of another format.
    """
    known = DOCUMENTS[task]
    where = f"{known.id}, split validation" if path is None else _file(path, task)
    try:
        if path is None:
            rows = list(known.of_rows(load_rows(known.id, known.config, split="validation", where=where)))
        else:
            rows = list(known.of_file(json.loads(Path(where).read_text(encoding="utf-8"))))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise KVPolicyError(
            f"datasets: {where} is not in the format that {known.files[0]} of RULER has; name a folder with the "
            "published file."
        ) from None
    numbers = {text: number for number, text in enumerate(sorted({text for row in rows for text in _texts(row)}))}
    asked = [
        DocumentQuestion(row.question, row.answers, _numbered(row.needed, numbers), _numbered(row.near, numbers))
        for row in rows
    ]
    if not asked:
        raise KVPolicyError(f"datasets: {where} has no question with an answer in it; name another file.")
    random.Random(0).shuffle(asked)  # noqa: S311 - a sample, not a secret
    return Collection(tuple(numbers), tuple(asked))


def _file(path: str, task: str) -> str:
    names = DOCUMENTS[task].files
    found = next((Path(path) / name for name in names if (Path(path) / name).exists()), None)
    if found is None:
        raise KVPolicyError(f"datasets: {path} has no file {' or '.join(names)}, which {task} needs; add it.")
    return existing(str(found))


def _texts(row: _Row) -> tuple[str, ...]:
    return (*row.needed, *row.near)


def _numbered(texts: Sequence[str], numbers: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(numbers[text] for text in texts))


def _squad_file(data: Any) -> Iterable[_Row]:
    for article in data["data"]:
        paragraphs = article["paragraphs"]
        near = tuple(paragraph["context"] for paragraph in paragraphs)
        for paragraph in paragraphs:
            for asked in paragraph["qas"]:
                answers = _different(answer["text"] for answer in asked["answers"])
                if answers and not asked.get("is_impossible", False):
                    yield _Row(asked["question"], answers, (paragraph["context"],), near)


def _squad_rows(rows: Iterable[Any]) -> Iterable[_Row]:
    found = list(rows)
    near: dict[str, dict[str, None]] = {}
    for row in found:
        near.setdefault(row["title"], {})[row["context"]] = None
    for row in found:
        if answers := _different(row["answers"]["text"]):
            yield _Row(row["question"], answers, (row["context"],), tuple(near[row["title"]]))


def _hotpot_file(data: Any) -> Iterable[_Row]:
    for row in data:
        yield _hotpot(row["question"], row["answer"], row["context"])


def _hotpot_rows(rows: Iterable[Any]) -> Iterable[_Row]:
    for row in rows:
        context = row["context"]
        yield _hotpot(row["question"], row["answer"], zip(context["title"], context["sentences"], strict=True))


def _hotpot(question: str, answer: str, context: Iterable[Any]) -> _Row:
    return _Row(question, (answer,), tuple(f"{title}\n{''.join(sentences)}" for title, sentences in context))


def _different(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


DOCUMENTS: Final[Mapping[str, DocumentTask]] = {
    "qa_1": DocumentTask("rajpurkar/squad_v2", None, ("squad.json", "dev-v2.0.json"), _squad_file, _squad_rows),
    "qa_2": DocumentTask(
        "hotpotqa/hotpot_qa",
        "distractor",
        ("hotpotqa.json", "hotpot_dev_distractor_v1.json"),
        _hotpot_file,
        _hotpot_rows,
    ),
}
"""The tasks of question answering."""
