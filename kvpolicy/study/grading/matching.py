"""Graders that look for known strings and numbers in an output."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from kvpolicy.study.problem import Problem


def match_all(problem: Problem, output: str) -> dict[str, float]:
    """Return the share of the answers that occur in the output, whatever their case (RULER, section 3)."""
    found = [answer.lower() in _printable(output) for answer in problem.answers]
    return {"score": sum(found) / len(found), "exact": float(all(found))}


def match_any(problem: Problem, output: str) -> dict[str, float]:
    """Return 1 if one of the answers occurs in the output, whatever its case (RULER's question answering)."""
    found = float(any(answer.lower() in _printable(output) for answer in problem.answers))
    return {"score": found, "exact": found}


def _printable(output: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", output).lower()


def paragraph(problem: Problem, output: str) -> dict[str, float]:
    """Return the share of the output's numbers that are that of the right paragraph (LongBench, retrieval)."""
    return {"score": max(_share(re.sub(r"\D", "", answer), output) for answer in problem.answers)}


def count(problem: Problem, output: str) -> dict[str, float]:
    """Return the share of the output's numbers that are the right one (LongBench, passage_count)."""
    return {"score": max(_share(answer, output) for answer in problem.answers)}


def _share(answer: str, output: str) -> float:
    numbers = re.findall(r"\d+", output)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def first_integer(problem: Problem, output: str) -> dict[str, float]:
    """Compare the first run of digits (InfiniteBench, passkey and number_string)."""
    found = re.search("[0-9]+", output)
    return {"exact": float(found is not None and found[0] == problem.answer)}


def first_number(problem: Problem, output: str) -> dict[str, float]:
    """Compare the first number by value; an integer is asked for as one (InfiniteBench, math_find)."""
    found = re.search(r"\d+\.\d+|\d+", output)
    if found is None:
        return {"exact": 0.0}
    if re.fullmatch(r"-?\d+", problem.answer):
        return {"exact": float(found[0].isdigit() and int(found[0]) == int(problem.answer))}
    return {"exact": float(float(found[0]) == float(problem.answer))}


def last_integer(problem: Problem, output: str) -> dict[str, float]:
    """Compare the last word as an integer (InfiniteBench, code_run)."""
    words = re.sub(r"[\n.`'\":]", " ", output).split()
    try:
        return {"exact": float(int(words[-1]) == int(problem.answer))}
    except (IndexError, ValueError):
        return {"exact": 0.0}


_MARKS = re.compile(r"[\n:\"'.,?!{}]")


def a_word(problem: Problem, output: str) -> dict[str, float]:
    """Look for the answer among the words (InfiniteBench, kv_retrieval)."""
    return {"exact": float(problem.answer in _MARKS.sub(" ", output).split())}


def speaker(problem: Problem, output: str) -> dict[str, float]:
    """Look for the name among the words, whatever their case (InfiniteBench, longdialogue_qa_eng)."""
    return {"exact": float(problem.answer in _MARKS.sub(" ", output).upper().split())}


def leading_values(problem: Problem, output: str) -> dict[str, float]:
    """Return the share of the values that are right before the first wrong one (InfiniteBench, math_calc)."""
    given, right = re.findall("[0-9]+", output), 0
    while right < min(len(given), len(problem.answers)) and int(given[right]) == int(problem.answers[right]):
        right += 1
    return {"score": right / len(problem.answers), "exact": float(right == len(problem.answers))}


def masks(problem: Problem, output: str) -> dict[str, float]:
    """Return the share of the masks whose entity is right, of an answer in the form of a dictionary (LooGLE, cloze).

    The authors evaluate the output as Python; here nothing but a literal is read. They divide the sum over all problems
    by all masks, and this is a mean over problems.
    """
    right: dict[str, Any] = json.loads(problem.answer)
    begin, end = output.find("{"), output.rfind("}")
    try:
        given = ast.literal_eval(output[begin : end + 1]) if 0 <= begin < end else {}
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        given = {}
    if not isinstance(given, dict):
        given = {}
    found = [given.get(mask) == entity for mask, entity in right.items()]
    return {"score": sum(found) / len(found), "exact": float(all(found))}
