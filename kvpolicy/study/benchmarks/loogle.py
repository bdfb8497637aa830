"""LooGLE (arXiv 2311.04939): four tasks over long texts, each with several questions about one text."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from kvpolicy.errors import KVPolicyError
from kvpolicy.study.benchmarks.prompts import cut_middle, filled
from kvpolicy.study.benchmarks.tasked import TaskedSource
from kvpolicy.study.problem import Problem
from kvpolicy.study.source import TextMeasure

_QUESTION: Final = (
    "Please answer the question based on the long texts below. \n{context}\nQuestion: {question}\nAnswer: "
)

PROMPTS: Final[Mapping[str, str]] = {
    "shortdep_qa": _QUESTION,
    "shortdep_cloze": (
        "Please fill in the clozes based on the given long texts below. Each of the placeholder '<mask-n>' in the "
        "question "
        "could be an entity of Person, Location or Organiocation. The same masks represent the same entity. Output a "
        "json "
        "format answer, for example: {'<mask-0>': 'Bob', '<mask-1>': 'Gorrosion Magazine','<mask-2>': 'Bethel "
        "Horizon'}\n"
        "{context}\n Question: {question} What are the masked entities? \nAnswer:"
    ),
    "longdep_qa": _QUESTION,
    "longdep_summarization": "Please generate a summary of the below paper. \n{context}\n Summarization: ",
}
"""``config/task2prompt.json`` of its repository."""

LONGEST: Final[Mapping[str, int]] = {
    "shortdep_qa": 300,
    "shortdep_cloze": 50,
    "longdep_qa": 500,
    "longdep_summarization": 500,
}
"""Most tokens of an answer, ``config/task2maxlen.json``."""

_SUMMARY: Final = "longdep_summarization"
_CLOZE: Final = "shortdep_cloze"


class LooGleSource(TaskedSource):
    """LooGLE, without a chat template as its authors ask open models; too long a text loses its middle."""

    use: ClassVar[str] = "loogle"
    longest: ClassVar[int | None] = 500
    known: ClassVar[Sequence[str]] = tuple(PROMPTS)
    columns: ClassVar[Sequence[str]] = ("input", "qa_pairs", "output")
    folder: ClassVar[str] = "data/"

    id: str = "bigainlco/LooGLE"

    def _parts(self, task: str, fields: Mapping[str, Any], where: str) -> int:
        return 1 if task == _SUMMARY else len(_pairs(task, fields, where))

    def _problem(
        self, task: str, fields: Mapping[str, Any], part: int, where: str, measure: TextMeasure | None
    ) -> Problem:
        question, answer = ("", fields["output"]) if task == _SUMMARY else _pairs(task, fields, where)[part]
        prompt, question_at = filled(PROMPTS[task], {"context": str(fields["input"]), "question": question})
        chat = bool(self.chat)
        most = self.max_new_tokens or LONGEST[task]
        prompt, question_at = cut_middle(prompt, question_at, measure, self.truncate, most, chat=chat)
        text = json.dumps(answer, ensure_ascii=False) if task == _CLOZE else str(answer)
        return Problem(
            *("", 0, prompt, text, "masks" if task == _CLOZE else "rouge-l-recall"),
            chat=None if self.chat else False,
            answers=(text,),
            most_tokens=LONGEST[task],
            question_at=question_at,
        )


def _pairs(task: str, fields: Mapping[str, Any], where: str) -> list[tuple[str, Any]]:
    """Return questions and answers about a text; raises KVPolicyError.

    They are a list, or one that is written as Python writes it, as in the published files.
    """
    pairs = fields["qa_pairs"]
    try:
        read = ast.literal_eval(pairs) if isinstance(pairs, str) else pairs
        found = [(str(pair["Q"]), pair["A"]) for pair in read]
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise KVPolicyError(
            f"datasets: {where}: `qa_pairs` should be a list of questions `Q` and answers `A`, as loogle has it."
        ) from None
    if task == _CLOZE and not all(isinstance(answer, dict) and answer for _, answer in found):
        raise KVPolicyError(f"datasets: {where}: `A` should name the entity of each mask, as {task} has it.")
    return found
