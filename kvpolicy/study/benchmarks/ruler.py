"""RULER (arXiv 2404.06654): thirteen tasks of any length, eleven of them generated to the measure of a tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Final

from pydantic import Field, model_validator

from kvpolicy.contracts.component import LONGEST_TEXT
from kvpolicy.errors import KVPolicyError, did_you_mean
from kvpolicy.study.benchmarks import ruler_tasks
from kvpolicy.study.benchmarks.prompts import labelled
from kvpolicy.study.benchmarks.prose import Haystack
from kvpolicy.study.benchmarks.ruler_documents import DOCUMENTS, Collection, collection
from kvpolicy.study.benchmarks.ruler_tasks import FORMS, Asking, Drawn, documents
from kvpolicy.study.problem import Problem
from kvpolicy.study.source import Source, TextMeasure

TASKS: Final = (*FORMS, *DOCUMENTS)
"""All tasks, in the order of ``synthetic.yaml``."""

_QA_TOKENS: Final = 32


class RulerSource(Source):
    """RULER: needles, variables, words and questions about documents; seed s takes the s-th block of problems."""

    fresh_by_seed: ClassVar[bool] = True
    measured: ClassVar[bool] = True
    longest: ClassVar[int | None] = 128
    files: ClassVar[tuple[str, ...]] = ("path", "text")

    tokens: int = Field(default=4096, ge=256, le=LONGEST_TEXT)
    """Length of a problem in the model's own tokens, answer and chat template included."""
    tasks: list[str] | None = Field(default=None, min_length=1)
    """Which of the thirteen tasks; the eleven that are generated, and with `path` all, if left out."""
    text: str | None = None
    """A text file for essays and words, such as Paul Graham's essays; prose of our own making if left out."""
    path: str | None = None
    """A folder with squad.json and hotpotqa.json, as published, for `qa_1` and `qa_2`; the hub if left out."""
    chat: bool | None = None
    """Whether the tokenizer's chat template is applied; if left out, when there is one."""

    @model_validator(mode="after")
    def _known(self) -> RulerSource:
        for task in self.tasks or ():
            if task not in TASKS:
                raise ValueError(f"there is no task {task!r}.{did_you_mean(task, TASKS)} Tasks: {', '.join(TASKS)}")
        if len(set(self.tasks or ())) < len(self.tasks or ()):
            raise ValueError("a task is there twice; name it once")
        return self

    @property
    def chosen(self) -> tuple[str, ...]:
        """The tasks that are asked for, in the order of `TASKS`."""
        wanted = self.tasks or (FORMS if self.path is None else TASKS)
        return tuple(task for task in TASKS if task in wanted)

    @property
    def remote(self) -> str | None:
        """The id on the hub of the documents, where they come from there."""
        asked = [DOCUMENTS[task].id for task in self.chosen if task in DOCUMENTS]
        return ", ".join(asked) if asked and self.path is None else None

    def _label(self) -> str:
        length = f"{self.tokens // 1024}k" if self.tokens % 1024 == 0 else str(self.tokens)
        return labelled(f"ruler-{length}", TASKS, self.chosen)

    def problems(self, count: int, seed: int, measure: TextMeasure | None = None) -> list[Problem]:
        """Return `count` problems, the tasks in turn; a problem is as long as its units allow, and never longer.

        Args:
            count: how many.
            seed: seed s takes the s-th block of problems of each task.
            measure: of the model whose tokens are counted; needed.

        Raises:
            KVPolicyError: the length is too long for the model, or too short for a task; documents cannot be read.
        """
        assert measure is not None
        if measure.window is not None and self.tokens > measure.window:
            raise KVPolicyError(
                f"datasets: {self.label} is longer than the {measure.window:,} tokens that the model takes; write "
                "fewer `tokens`."
            )
        share = -(-count // len(self.chosen))
        of_task = [self._of_task(task, share, seed * share, measure) for task in self.chosen]
        turns = [found[turn] for turn in range(share) for found in of_task if turn < len(found)]
        return turns[:count]

    def _of_task(self, task: str, count: int, first: int, measure: TextMeasure) -> list[Problem]:
        known = collection(task, self.path) if task in DOCUMENTS else None
        most = FORMS[task].most_tokens if known is None else _QA_TOKENS
        fitting = _Fitting(self.tokens - most - measure.frame(chat=self.chat), measure)
        text = Haystack(self.text)
        example = self._example(task, measure)
        last = first + count if known is None else min(first + count, len(known.asked))
        found = []
        for number in range(first, last):
            draw = partial(self._drawn, task, number, text, example, known)
            least = FORMS[task].least if known is None else len(known.asked[number].needed)
            drawn = fitting.longest(draw, least, len(known.texts) if known is not None else LONGEST_TEXT)
            if drawn is None:
                raise KVPolicyError(
                    f"datasets: {self.label}: {task} does not fit into {self.tokens:,} tokens of this model's "
                    "tokenizer; write more `tokens`, or name the other `tasks`."
                )
            found.append(
                Problem(
                    *(self.label, number * len(TASKS) + TASKS.index(task), drawn.context + drawn.question),
                    *(drawn.answers[0], "match-all" if known is None else "match-any"),
                    chat=self.chat,
                    answers=drawn.answers,
                    task=task,
                    prefix=drawn.prefix,
                    most_tokens=most,
                    question_at=len(drawn.context),
                )
            )
        return found

    def _example(self, task: str, measure: TextMeasure) -> int:
        """Return the size of the solved example of a task that has one of its own length."""
        if task not in FORMS or not FORMS[task].example:
            return 0
        size, least = FORMS[task].least, FORMS[task].least
        rng = random.Random("example")  # noqa: S311 - always the same
        while measure.count(ruler_tasks.example(rng, size + 1)) <= ruler_tasks.EXAMPLE_TOKENS:
            size += 1
        return max(size, least)

    def _drawn(
        self, task: str, number: int, text: Haystack, example: int, known: Collection | None, size: int
    ) -> Drawn:
        rng = random.Random(f"ruler/{task}/{number}")  # noqa: S311 - not a secret
        if known is not None:
            return documents(known.asked[number], known.texts, size, rng)
        return FORMS[task].draw(Asking(rng, size, text, self.tokens, example))


class _Fitting:
    """Finds how much fits: searched for with the first problem, and less from there on where another one needs less."""

    def __init__(self, room: int, measure: TextMeasure) -> None:
        self._room, self._measure = room, measure
        self._size: int | None = None

    def longest(self, draw: Callable[[int], Drawn], least: int, most: int) -> Drawn | None:
        """Return the longest problem that fits, or None if not even the least does."""
        if self._size is None:
            self._size = self._searched(draw, least, most)
        size = max(least, min(self._size, most))
        while (excess := self._length(drawn := draw(size)) - self._room) > 0:
            if size <= least:
                return None
            size = max(least, size - max(1, size * excess // (self._room + excess)))
        return drawn

    def _searched(self, draw: Callable[[int], Drawn], least: int, most: int) -> int:
        fits, above = least, 2 * least
        while above <= most and self._length(draw(above)) <= self._room:
            fits, above = above, 2 * above
        above = min(above, most + 1)
        while above - fits > 1:
            middle = (fits + above) // 2
            if self._length(draw(middle)) <= self._room:
                fits = middle
            else:
                above = middle
        return fits

    def _length(self, drawn: Drawn) -> int:
        return self._measure.count(drawn.context + drawn.question) + self._measure.count(drawn.prefix)
