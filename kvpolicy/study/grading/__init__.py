"""What an answer is worth: one grader per way in which benchmarks compare an output with what is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from kvpolicy.study.grading import exact, matching, options, overlap
from kvpolicy.study.problem import Problem


@dataclass(frozen=True)
class Grader:
    """A way to grade.

    Attributes:
        grade: takes a problem and an output, and returns metrics by name: ``exact`` (0 or 1), ``score`` (0 to 1) or
            both; generated problems have ``progress`` too.
        libraries: packages whose version can change a grade; they are part of a run's key.
    """

    grade: Callable[[Problem, str], dict[str, float]]
    libraries: tuple[str, ...] = ()


GRADERS: Final[Mapping[str, Grader]] = {
    "none": Grader(lambda _problem, _output: {}),
    "generator": Grader(exact.generator),
    "math": Grader(exact.mathematics, ("math-verify",)),
    "number": Grader(exact.number),
    "text": Grader(exact.text),
    "match-all": Grader(matching.match_all),
    "match-any": Grader(matching.match_any),
    "answer-letter": Grader(options.answer_letter),
    "correct-answer-letter": Grader(options.correct_answer_letter),
    "book-option": Grader(options.book_option),
    "function-option": Grader(options.function_option),
    "class": Grader(options.one_class),
    "paragraph": Grader(matching.paragraph),
    "count": Grader(matching.count),
    "first-integer": Grader(matching.first_integer),
    "first-number": Grader(matching.first_number),
    "last-integer": Grader(matching.last_integer),
    "a-word": Grader(matching.a_word),
    "speaker": Grader(matching.speaker),
    "leading-values": Grader(matching.leading_values),
    "masks": Grader(matching.masks),
    "code-line": Grader(overlap.code_line),
    "f1": Grader(overlap.f1),
    "f1-characters": Grader(overlap.f1_characters),
    "f1-chinese": Grader(overlap.f1_chinese, ("jieba",)),
    "rouge-l": Grader(overlap.rouge_l, ("rouge",)),
    "rouge-l-recall": Grader(overlap.rouge_l_recall, ("rouge",)),
    "rouge-l-chinese": Grader(overlap.rouge_l_chinese, ("rouge", "jieba")),
    "rouge-lsum": Grader(overlap.rouge_lsum, ("rouge-score",)),
}
"""Graders by the name that `Problem.grader` has."""

FIRST_LINE: Final = "-of-first-line"
"""Ending of a grader's name that grades the first line that is not empty, as LongBench has it for few-shot tasks."""


def named(name: str) -> Grader:
    """Return the grader of a name, with or without `FIRST_LINE`."""
    return GRADERS[name.removesuffix(FIRST_LINE)]


def grade(problem: Problem, output: str) -> dict[str, float]:
    """Return the metrics that an output earns.

    Args:
        problem: with answer and grader.
        output: the generated text, special tokens left out.

    Raises:
        KVPolicyError: the grader needs a library that is not installed.
    """
    if problem.grader.endswith(FIRST_LINE):
        output = output.lstrip("\n").partition("\n")[0]
    return named(problem.grader).grade(problem, output)
