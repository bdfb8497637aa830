"""Multiple choice: one letter of four."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final

from pydantic import AfterValidator, Field

from kvpolicy.contracts.component import LONGEST_TEXT
from kvpolicy.study.benchmarks.prompts import cut_middle, filled, require_published
from kvpolicy.study.dataset_rows import load_rows, local_rows
from kvpolicy.study.problem import Problem
from kvpolicy.study.sampling import HOTTEST, warm
from kvpolicy.study.source import Source, TextMeasure

LETTERS: Final = "ABCD"

GPQA_PROMPT: Final = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n"
    "{question}\n\nA) {A}\nB) {B}\nC) {C}\nD) {D}"
)
"""That of OpenAI's simple-evals."""

LONGBENCH2_PROMPT: Final = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
    "What is the correct answer to this question: {question}\nChoices:\n(A) {A}\n(B) {B}\n(C) {C}\n(D) {D}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)
"""``0shot.txt`` of its repository."""


class ChoiceSource(Source):
    """Rows with a question and four options."""

    use: ClassVar[str]
    columns: ClassVar[Sequence[str]]

    id: str
    """Its id on the hub."""
    config: str | None = None
    """Name of the configuration."""
    split: str = "train"
    """Name of the split."""
    revision: str | None = None
    """Commit or tag; the newest if left out."""
    path: str | None = None
    """A local copy (JSON Lines, JSON, CSV or Parquet); the hub if left out."""
    chat: bool | None = None
    """Whether the tokenizer's chat template is applied; if left out, when there is one."""

    def _label(self) -> str:
        return self.use

    def _rows(self) -> Any:
        where = self.path or f"{self.id}, split {self.split}"
        if self.path is not None:
            rows = local_rows(self.path)
        else:
            rows = load_rows(self.id, self.config, split=self.split, revision=self.revision, where=where)
        require_published(rows.column_names, self.columns, where, self.use)
        return rows

    def problems(self, count: int, seed: int, measure: TextMeasure | None = None) -> list[Problem]:
        """Return the first `count` problems of an order that is shuffled, but always the same."""
        rows = self._rows()
        order = list(range(len(rows)))
        random.Random(0).shuffle(order)  # noqa: S311 - a sample, not a secret
        return [self._problem(i, rows[i], measure) for i in order[:count]]

    @abstractmethod
    def _problem(self, index: int, row: Mapping[str, Any], measure: TextMeasure | None) -> Problem: ...


class GpqaDiamondSource(ChoiceSource):
    """GPQA-Diamond, which is gated; the order of the four options is drawn for each problem, always the same."""

    use: ClassVar[str] = "gpqa-diamond"
    size: ClassVar[int | None] = 198
    columns: ClassVar[Sequence[str]] = (
        *("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
    )

    id: str = "Idavidrein/gpqa"
    config: str | None = "gpqa_diamond"

    def _problem(self, index: int, row: Mapping[str, Any], measure: TextMeasure | None) -> Problem:
        options = [str(row[column]).strip() for column in self.columns[1:]]
        order = random.Random(f"gpqa/{row['Question']}").sample(range(4), 4)  # noqa: S311 - not a secret
        lettered = {letter: options[i] for letter, i in zip(LETTERS, order, strict=True)}
        prompt, _ = filled(GPQA_PROMPT, {"question": str(row["Question"]).strip(), **lettered})
        answer = LETTERS[order.index(0)]
        return Problem(self.label, index, prompt, answer, "answer-letter", chat=self.chat)


class LongBench2Source(ChoiceSource):
    """LongBench v2; of a text that does not fit the model the middle is left out."""

    use: ClassVar[str] = "longbench-v2"
    size: ClassVar[int | None] = 503
    longest: ClassVar[int | None] = 128
    measured: ClassVar[bool] = True
    columns: ClassVar[Sequence[str]] = (
        *("context", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer"),
    )

    id: str = "THUDM/LongBench-v2"
    temperature: Annotated[float | None, AfterValidator(lambda t: None if t is None else warm(t))] = Field(
        default=0.1, ge=0, le=HOTTEST
    )
    """As in the study's `sampling`; the authors' 0.1 if left out."""
    truncate: int | None = Field(default=None, ge=2, le=LONGEST_TEXT)
    """Most tokens of a prompt, of which the middle is left out; what the model takes if left out."""

    def _problem(self, index: int, row: Mapping[str, Any], measure: TextMeasure | None) -> Problem:
        values = {name: str(row[name]).strip() for name in ("context", "question")}
        values |= {letter: str(row[f"choice_{letter}"]).strip() for letter in LETTERS}
        prompt, question_at = filled(LONGBENCH2_PROMPT, values)
        most = self.max_new_tokens or 128
        prompt, question_at = cut_middle(prompt, question_at, measure, self.truncate, most, chat=self.chat)
        return Problem(
            *(self.label, index, prompt, str(row["answer"]).strip(), "correct-answer-letter"),
            chat=self.chat,
            task=str(row["domain"]) if row.get("domain") else "",
            most_tokens=128,
            question_at=question_at,
        )
