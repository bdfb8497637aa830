"""Synthetic reasoning problems with long, verbose, self-checking solutions, for measuring what eviction costs.

Three families, because each alone crowns a wrong method:

- **prompt-recall**: a shuffled list of links in the prompt is walked place by place with a running total modulo 100.
  Every fact stands in the prompt and is needed once, at a time that cannot be foreseen. Keeping the prompt and the
  newest tokens is enough to solve it.
- **trace-recall**: variables are computed one by one, each from an *earlier computed* variable and a digit, modulo 10,
  and some are asked for at the end. Nearly all that is needed stands only in the trace, further back than the newest
  tokens.
- **restated-recall**: as trace-recall, but each variable is computed from the one a few steps before it, and steps say
  again the values that are still needed, as often as the problem's redundancy.

The published levels have three lengths; prompt and solution together stay below 2,000 tokens. Problems are a pure
function of (family, level, split, index). Which split a problem belongs to is decided by a hash of what it says, not by
its seed, so no problem of one split ever occurs in another, however many are drawn.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, Literal, get_args

from kvpolicy.errors import KVPolicyError
from kvpolicy.study.wording import END, FIRST_WORD, MARKS, NAMES, PROMPT, STOP, Family, Form, Times, restating, step

Level = Literal["short", "medium", "long"]
Redundancy = Literal[1, 2, 4, 8]
Split = Literal["train", "development", "test"]


@dataclass(frozen=True)
class Size:
    """How large a problem is.

    Attributes:
        steps: links walked, or variables computed.
        distractors: links that are never reached (prompt-recall only).
        asked: values asked for at the end (not in prompt-recall).
        redundancy: how often a value that a later step needs is said again before (restated-recall only).
    """

    steps: int
    distractors: int = 0
    asked: int = 1
    redundancy: Redundancy = 1


APART: Final = 4
"""Steps from computing a value of restated-recall to needing it; the values of as many steps are still needed."""


LEVELS: Final[Mapping[Family, Mapping[Level, Size]]] = {
    "prompt-recall": {
        "short": Size(3, distractors=2),
        "medium": Size(6, distractors=2),
        "long": Size(11, distractors=2),
    },
    "trace-recall": {"short": Size(4, asked=2), "medium": Size(8, asked=4), "long": Size(14, asked=4)},
    "restated-recall": {"short": Size(5, asked=2), "medium": Size(10, asked=4), "long": Size(18, asked=4)},
}

REDUNDANCIES: Final[Mapping[Family, tuple[Redundancy | None, ...]]] = {
    "prompt-recall": (None,),
    "trace-recall": (None,),
    "restated-recall": get_args(Redundancy),
}
"""The redundancies that a family is published at; None where it has no such thing."""

_CONCLUSION: Final[Mapping[Family, str]] = {
    "prompt-recall": r"so the total is (\d \d) and the next one is (\w+) \.",
    "trace-recall": r"so we have (\w+) is (\d) and we go to (\w+) \.",
    "restated-recall": r"so we have (\w+) is (\d) and we go to (\w+) \.",
}


@dataclass(frozen=True)
class SolvedProblem:
    """A problem with its one right solution.

    Attributes:
        family: which of the families.
        prompt: what the model is given, up to and including ``<think>``; the tokenizer puts ``<bos>`` before it.
        solution: what a perfect model continues with; ``<eos>`` follows.
        answer: the words after "the answer is".
    """

    family: Family
    prompt: str
    solution: str
    answer: str


@dataclass(frozen=True)
class Grade:
    """What a generated text is worth.

    Attributes:
        exact: the first answer given is word for word the right one.
        progress: share of the steps that were concluded rightly before the first wrong conclusion, 0 to 1.
    """

    exact: bool
    progress: float


def problems(
    family: Family,
    level: Level,
    split: Split,
    count: int,
    *,
    first: int = 0,
    redundancy: Redundancy | None = None,
) -> Iterator[SolvedProblem]:
    """Yield the published problems ``first`` to ``first + count - 1`` of a level.

    Args:
        family: "prompt-recall", "trace-recall" or "restated-recall".
        level: "short", "medium" or "long".
        split: "development" for choosing settings, "test" for reporting; "train" is what the shipped model saw.
        count: how many.
        first: the index of the first.
        redundancy: 1, 2, 4 or 8 for restated-recall, nothing for the others. At all four, an index names problems with
            the same values, and the same split.

    Raises:
        KVPolicyError: if a name is unknown, a number is negative, or the redundancy is missing or is too much.
    """
    for what, given, allowed in (
        ("family", family, get_args(Family)),
        ("level", level, get_args(Level)),
        ("split", split, get_args(Split)),
    ):
        if given not in allowed:
            raise KVPolicyError(f"{what}: {given!r} is not one of {', '.join(allowed)}.")
    if count < 0 or first < 0:
        raise KVPolicyError(f"count and first: should be 0 or more, got {count} and {first}.")
    size = sized(family, level, redundancy)
    return (
        draw(random.Random(f"{family}/{level}/{split}/{index}"), family, size, split=split)  # noqa: S311
        for index in range(first, first + count)
    )


def sized(family: Family, level: Level, redundancy: Redundancy | None) -> Size:
    """Return the size of a level, at a redundancy where the family has one.

    Raises:
        KVPolicyError: if restated-recall is given no redundancy or an unknown one, or another family is given one.
    """
    allowed = REDUNDANCIES[family]
    if redundancy not in allowed:
        if allowed == (None,):
            raise KVPolicyError(f"redundancy: {family} has none, leave it out; restated-recall has.")
        given = "nothing" if redundancy is None else repr(redundancy)
        raise KVPolicyError(f"redundancy: {family} needs one of {', '.join(map(str, allowed))}, got {given}.")
    size = LEVELS[family][level]
    return size if redundancy is None else replace(size, redundancy=redundancy)


def draw(
    rng: random.Random,
    family: Family,
    size: Size,
    *,
    split: Split = "train",
    form: Form = "full",
    digits: tuple[int, ...] = tuple(range(1, 10)),
) -> SolvedProblem:
    """Return a problem of the split, drawn from ``rng``.

    Args:
        rng: the only source of randomness.
        family: which family.
        size: how many steps, distractors and questions.
        split: candidates that hash to another split are thrown away.
        form: how the solution is worded; all but "full" are for training.
        digits: what the digits of the lines are drawn from.
    """
    if family == "prompt-recall":
        make, needed = _prompt_recall, size.steps + size.distractors
    else:
        make, needed = _restated_recall if family == "restated-recall" else _trace_recall, size.steps + 1
    most = min(size.steps, APART) if family == "restated-recall" else size.steps
    if not size.steps >= 1 or needed > len(NAMES) or not 1 <= size.asked <= most:
        raise KVPolicyError(f"size: {size} needs {needed} of {len(NAMES)} names and 1 to {most} questions.")
    while True:
        identity, problem = make(rng, size, form, digits)
        if _split_of(identity) == split:
            return problem


def grade(problem: SolvedProblem, text: str) -> Grade:
    """Return what ``text``, a generated continuation of ``problem.prompt``, is worth."""
    given = re.search(r"</think> the answer is ([^.]*?) \.", text)
    pattern = _CONCLUSION[problem.family]
    expected, found = re.findall(pattern, problem.solution), re.findall(pattern, text.partition("</think>")[0])
    right = 0
    while right < min(len(expected), len(found)) and expected[right] == found[right]:
        right += 1
    return Grade(given is not None and given[1] == problem.answer, right / len(expected))


def _split_of(identity: str) -> Split:
    tenth = hashlib.sha256(identity.encode()).digest()[0] % 10
    return "development" if tenth == 0 else "test" if tenth == 1 else "train"


def _prompt_recall(rng: random.Random, size: Size, form: Form, digits: tuple[int, ...]) -> tuple[str, SolvedProblem]:
    names = rng.sample(NAMES, size.steps + size.distractors)
    path = [*names[: size.steps], STOP]
    links = [(n, rng.choice(digits), m) for n, m in pairwise(path)]
    others = [(n, rng.choice(digits), rng.choice([m for m in (*names, STOP) if m != n])) for n in names[size.steps :]]
    lines = [f"{n} {d} {m}" for n, d, m in links + others]
    total = rng.randrange(100)
    identity = f"prompt-recall {path[0]} {total} {sorted(lines)}"
    rng.shuffle(lines)
    prompt = PROMPT["prompt-recall"].format(
        first=FIRST_WORD[form], start=path[0], total=_two(total), lines=" . ".join(lines)
    )
    text = []
    for n, d, m in links:
        after = (total + d) % 100
        text.append(step("prompt-recall", form, n=n, d=str(d), m=m, t=_two(total), u=_two(after)))
        total = after
    return identity, SolvedProblem("prompt-recall", prompt, _finish(text, form, _two(total)), _two(total))


def _trace_recall(rng: random.Random, size: Size, form: Form, digits: tuple[int, ...]) -> tuple[str, SolvedProblem]:
    root, *names = rng.sample(NAMES, size.steps + 1)
    value = {root: rng.randrange(10)}
    text, lines = [], []
    for n, m in zip(names, [*names[1:], STOP], strict=True):
        parent, d = rng.choice(list(value)), rng.choice(digits)
        a, b = value[parent], (value[parent] + d) % 10
        text.append(step("trace-recall", form, n=n, d=str(d), p=parent, m=m, a=str(a), b=str(b)))
        lines.append(f"{n} {d} {parent} {m}")
        value[n] = b
    asked = rng.sample(names, size.asked)
    identity = f"trace-recall {root} {value[root]} {sorted(lines)} {sorted(asked)}"
    rng.shuffle(lines)
    return identity, _asked("trace-recall", form, value, asked, " . ".join(lines), text)


def _restated_recall(rng: random.Random, size: Size, form: Form, digits: tuple[int, ...]) -> tuple[str, SolvedProblem]:
    root, *names = rng.sample(NAMES, size.steps + 1)
    value = {root: rng.randrange(10)}
    text, lines, bare = [], [], []
    for index, (n, m) in enumerate(zip(names, [*names[1:], STOP], strict=True)):
        parent, d = names[index - APART] if index >= APART else root, rng.choice(digits)
        a, b = value[parent], (value[parent] + d) % 10
        value[n] = b
        times = _times(size.steps - 1 - index, size.redundancy)
        needed = " , ".join(f"{x} is {value[x]}" for x in names[max(0, index - APART + 1) : index + 1])
        words = {"n": n, "d": str(d), "p": parent, "m": m, "mark": MARKS[times], "a": str(a), "b": str(b)}
        text.append(" ".join(step("restated-recall", form, **words, **restating(form, n, needed, times)).split()))
        lines.append(f"{n} {d} {parent} {m} {MARKS[times]}")
        bare.append(f"{n} {d} {parent} {m}")
    asked = rng.sample(names[-APART:], size.asked)
    # Without the marks: at all redundancies it is one problem, of one split.
    identity = f"restated-recall {root} {value[root]} {sorted(bare)} {sorted(asked)}"
    rng.shuffle(lines)
    return identity, _asked("restated-recall", form, value, asked, " ".join(lines), text)


def _asked(
    family: Family, form: Form, value: Mapping[str, int], asked: Sequence[str], lines: str, text: list[str]
) -> SolvedProblem:
    """Return a problem that asks for values; the first name of `value` is given, and the second is the start."""
    root, start = list(value)[:2]
    prompt = PROMPT[family].format(
        first=FIRST_WORD[form], start=start, root=root, value=value[root], lines=lines, asked=" , ".join(asked)
    )
    answer = " , ".join(f"{n} is {value[n]}" for n in asked)
    return SolvedProblem(family, prompt, _finish(text, form, answer), answer)


def _times(left: int, redundancy: int) -> Times:
    """Return how often the values are said again in the step that ``left`` others follow.

    Any four steps in a row have ``redundancy`` in all, and the last step has at least one.
    """
    if redundancy > APART:
        return 2
    return 1 if left % (APART // redundancy) == 0 else 0


def _finish(text: list[str], form: Form, answer: str) -> str:
    return " ".join(text if form == "walk" else [*text, END.format(answer=answer)])


def _two(number: int) -> str:
    return f"{number // 10} {number % 10}"
