"""One problem of a study."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass, fields
from typing import Final, Literal

from kvpolicy.study.wording import Family

Compress = Literal["prompt", "context"]
"""What is compressed to the budget, once: the whole prompt, or the context before the question is seen."""

_FIRST: Final = 10
"""Fields that are always part of `Problem.digest`; later ones are where they say something, so that old runs stay."""


@dataclass(frozen=True)
class Problem:
    """One problem; plain values only, so that it travels to other processes and machines.

    Attributes:
        dataset: label of the dataset.
        index: number in the dataset.
        prompt: what the model is given; empty for free text.
        answer: the right answer, or the first of several.
        grader: how an output is compared with it, a name of `kvpolicy.study.grading`; "none" if there is no answer.
        chat: whether the chat template is applied; None means if the tokenizer has one.
        solution: the one right output, where there is one.
        family: family of a generated problem.
        text: free text.
        cut: (tokens given as a prompt, tokens read) of the free text.
        answers: all right answers, where there are several; what the grader makes of them is its own.
        classes: all classes, where the answer is one of them.
        task: the task that it belongs to, where a dataset has several.
        prefix: how the answer begins: the model is given it behind the prompt and behind the chat template's header.
        most_tokens: most tokens of an answer as the dataset's authors have it; None leaves it to the study.
        question_at: where in the prompt the question about it begins, in characters; 0 if it has no such place.
    """

    dataset: str
    index: int
    prompt: str
    answer: str = ""
    grader: str = "none"
    chat: bool | None = None
    solution: str = ""
    family: Family | None = None
    text: str = ""
    cut: tuple[int, int] = (0, 0)
    answers: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    task: str = ""
    prefix: str = ""
    most_tokens: int | None = None
    question_at: int = 0

    @property
    def context(self) -> str:
        """What the question is about, of a prompt that has a place for it; otherwise empty."""
        return self.prompt[: self.question_at]

    @property
    def digest(self) -> str:
        """Names what is asked, whatever the dataset is called; where the question begins changes nothing of that."""
        values = astuple(self)
        later = [
            (field.name, value)
            for field, value in zip(fields(self)[_FIRST:], values[_FIRST:], strict=True)
            if value != field.default and field.name != "question_at"
        ]
        return hashlib.sha256(repr((*values[2:_FIRST], *later)).encode()).hexdigest()[:32]
