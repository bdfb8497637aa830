"""One problem of a study, and how an answer to it is graded."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import astuple, dataclass
from typing import Any, Literal

from kvpolicy.study import tasks
from kvpolicy.study.extra import library
from kvpolicy.study.wording import Family

Grader = Literal["generator", "math", "number", "text", "none"]
_GRADING_SECONDS = 5


@dataclass(frozen=True)
class Problem:
    """One problem; plain values only, so that it travels to other processes and machines.

    Attributes:
        dataset: label of the dataset.
        index: number in the dataset.
        prompt: what the model is given; empty for free text.
        answer: the right answer.
        grader: how an output is compared with it; "none" if there is no answer.
        chat: whether the chat template is applied; None means if the tokenizer has one.
        solution: the one right output, where there is one.
        family: family of a generated problem.
        text: free text.
        cut: (tokens given as a prompt, tokens read) of the free text.
    """

    dataset: str
    index: int
    prompt: str
    answer: str = ""
    grader: Grader = "none"
    chat: bool | None = None
    solution: str = ""
    family: Family | None = None
    text: str = ""
    cut: tuple[int, int] = (0, 0)

    @property
    def digest(self) -> str:
        """Names what is asked, whatever the dataset is called."""
        return hashlib.sha256(repr(astuple(self)[2:]).encode()).hexdigest()[:32]


def grade(problem: Problem, output: str) -> dict[str, float]:
    """Return the metrics that an output earns: ``exact`` (0 or 1) and, for generated problems, ``progress``.

    Args:
        problem: with answer and grader.
        output: the generated text, special tokens left out.

    Raises:
        KVPolicyError: the grader needs a library that is not installed.
    """
    if problem.grader == "generator":
        assert problem.family is not None
        known = tasks.SolvedProblem(problem.family, problem.prompt, problem.solution, problem.answer)
        given = tasks.grade(known, output)
        return {"exact": float(given.exact), "progress": given.progress}
    if problem.grader == "math":
        return {"exact": float(_same_mathematics(problem.answer, output))}
    if problem.grader == "number":
        found = re.search(r"-?\d+(?:\.\d+)?", output.replace(",", ""))
        return {"exact": float(found is not None and found[0] == problem.answer)}
    if problem.grader == "text":
        return {"exact": float(_plain(output) == _plain(problem.answer))}
    return {}


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


def _same_mathematics(answer: str, output: str) -> bool:
    verifier: Any = library("math_verify", "grade: math needs")
    # Its time limit is a signal, which only the main thread can receive.
    seconds = _GRADING_SECONDS if threading.current_thread() is threading.main_thread() else None
    gold = verifier.parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$", parsing_timeout=seconds)
    given = verifier.parse(output, parsing_timeout=seconds)
    return bool(verifier.verify(gold, given, timeout_seconds=seconds))
