"""Graders of answers that are right or wrong."""

from __future__ import annotations

import re
import threading
from typing import Any, Final

from kvpolicy.study import tasks
from kvpolicy.study.extra import library
from kvpolicy.study.problem import Problem

_GRADING_SECONDS: Final = 60  # by the clock, and a machine with much to do is no reason to call an answer wrong


def generator(problem: Problem, output: str) -> dict[str, float]:
    """Grade a problem of `kvpolicy.study.tasks`: ``exact`` and ``progress``."""
    assert problem.family is not None
    known = tasks.SolvedProblem(problem.family, problem.prompt, problem.solution, problem.answer)
    given = tasks.grade(known, output)
    return {"exact": float(given.exact), "progress": given.progress}


def mathematics(problem: Problem, output: str) -> dict[str, float]:
    """Compare by value, with math-verify; raises KVPolicyError if it is not installed."""
    verifier: Any = library("math_verify", "grade: math needs")
    # Its time limit is a signal, which only the main thread can receive.
    seconds = _GRADING_SECONDS if threading.current_thread() is threading.main_thread() else None
    answer = problem.answer
    gold = verifier.parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$", parsing_timeout=seconds)
    given = verifier.parse(output, parsing_timeout=seconds)
    return {"exact": float(bool(verifier.verify(gold, given, timeout_seconds=seconds)))}


def number(problem: Problem, output: str) -> dict[str, float]:
    """Compare the first number of the output."""
    found = re.search(r"-?\d+(?:\.\d+)?", output.replace(",", ""))
    return {"exact": float(found is not None and found[0] == problem.answer)}


def text(problem: Problem, output: str) -> dict[str, float]:
    """Compare all but case, blanks and the last full stop."""
    return {"exact": float(_plain(output) == _plain(problem.answer))}


def _plain(words: str) -> str:
    return " ".join(words.split()).casefold().rstrip(".")
