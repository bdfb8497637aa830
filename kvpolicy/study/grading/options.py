"""Graders of a choice among options, and of classes."""

from __future__ import annotations

import re
from typing import Final

from kvpolicy.study.problem import Problem

_ANSWER: Final = re.compile(r"(?i)Answer[ \t]*:[ \t]*\$?([A-D])\$?")
_CORRECT: Final = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))


def answer_letter(problem: Problem, output: str) -> dict[str, float]:
    """Compare the letter behind the first ``Answer:`` (OpenAI's simple-evals, GPQA).

    What stands before the end of a thought, ``</think>``, is no answer.
    """
    found = _ANSWER.search(output.rpartition("</think>")[2])
    return {"exact": float(found is not None and found[1].upper() == problem.answer)}


def correct_answer_letter(problem: Problem, output: str) -> dict[str, float]:
    """Compare the letter of ``The correct answer is (A)``, without the brackets too (LongBench v2)."""
    plain = output.replace("*", "")
    found = _CORRECT[0].search(plain) or _CORRECT[1].search(plain)
    return {"exact": float(found is not None and found[1] == problem.answer)}


def one_class(problem: Problem, output: str) -> dict[str, float]:
    """Return one over the number of classes that the output names, if the right one is among them (LongBench).

    A name that is part of the right one's does not count. The authors' loop takes names out of the list that it goes
    through, and so never looks at the one behind a name that it took out; so that numbers are theirs, this one does
    the same.
    """
    return {"score": max(_class_score(answer, problem.classes, output) for answer in problem.answers)}


def _class_score(answer: str, classes: tuple[str, ...], output: str) -> float:
    named = [name for name in classes if name in output]
    i = 0
    while i < len(named):
        if named[i] in answer and named[i] != answer:
            del named[i]
        i += 1
    return 1 / len(named) if answer in named else 0.0


def book_option(problem: Problem, output: str) -> dict[str, float]:
    """Grade a letter or the text of an option (InfiniteBench, longbook_choice_eng).

    Args:
        problem: its `answers` are the option's text and its letter.
        output: begins with the letter, names it after one of some phrases, or somewhere.
    """
    right, given = problem.answers, output.strip()
    if not given:
        return {"exact": 0.0}
    if given[0] in "ABCD":
        return {"exact": float(given[0] in right)}
    if given in right:
        return {"exact": 1.0}
    given = " ".join(re.sub(r"[\n\"'.,?!{}]", " ", given).split(" "))
    given = re.sub(" +", " ", given)
    found = _behind(given, ("answer is:", "answer:", "answer is", "option is"))
    if found is not None:
        return {"exact": float(any(found.startswith(each) for each in right))}
    letter = next((word for word in given.split() if word in "ABCD"), None)
    return {"exact": float(letter is not None and letter in right)}


def function_option(problem: Problem, output: str) -> dict[str, float]:
    """Grade a letter or the name of a function (InfiniteBench, code_debug); `answers` are the name and the letter."""
    name, letter = problem.answers
    given = output.strip()
    if given[:2] in (f"{letter}.", f"{letter}:"):
        return {"exact": 1.0}
    given = re.sub(r"[\n`'\"\-*]|[Oo]ption", " ", given)
    given = re.sub(" +", " ", given)
    found = _behind(given, ("answer is:", "is:", "answer:", "correct option is:"))
    return {"exact": float(found is not None and found.startswith((letter, name)))}


def _behind(given: str, phrases: tuple[str, ...]) -> str | None:
    """Return what stands behind the first of the phrases that occurs, without the blank between."""
    for phrase in phrases:
        at = given.find(phrase)
        if at >= 0:
            return given[at + len(phrase) + 1 :]
    return None
