"""The tasks of RULER (arXiv 2404.06654), generated: prompts and settings are those of its repository."""

from __future__ import annotations

import random
import re
import string
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import pi
from typing import Final

from kvpolicy.study.benchmarks.prose import Haystack

_NOISE: Final = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SHORT: Final = 4096  # below so many tokens its repository makes cwe easier


@dataclass(frozen=True)
class Drawn:
    """A problem of RULER.

    Attributes:
        context: what comes before the question.
        question: the question.
        prefix: how the answer begins.
        answers: what has to be in the answer.
    """

    context: str
    question: str
    prefix: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Asking:
    """What a task may draw on.

    Attributes:
        rng: the only source of randomness.
        size: how much there is to look through, in units of the task.
        text: words and prose.
        tokens: length that is asked for, in tokens.
        example: units of the solved example that comes first, where the task has one of a length of its own.
    """

    rng: random.Random
    size: int
    text: Haystack
    tokens: int
    example: int = 0


@dataclass(frozen=True)
class Form:
    """A task.

    Attributes:
        draw: makes a problem.
        most_tokens: most tokens of an answer.
        least: least size.
        example: the task begins with a solved example of about 500 tokens.
    """

    draw: Callable[[Asking], Drawn]
    most_tokens: int
    least: int
    example: bool = False


# -- needles ----------------------------------------------------------------------------------------------------------


def _needles(
    haystack: str, *, key: str = "words", value: str = "numbers", keys: int = 1, values: int = 1, queries: int = 1
) -> Callable[[Asking], Drawn]:
    def draw(asking: Asking) -> Drawn:
        rng = asking.rng
        made: dict[str, list[str]] = {}
        taken: set[str] = set()
        while len(made) < max(keys, queries):
            made.setdefault(_random(key, asking), [_fresh(value, asking, taken) for _ in range(values)])
        needles = [_needle(value, name, each) for name, given in made.items() for each in given]
        rng.shuffle(needles)
        if haystack == "essay":
            context = _among_sentences(asking.text.essay(asking.size), needles, rng)
        else:
            lines = [
                _NOISE
                if haystack == "noise"
                else _needle(value, _fresh(key, asking, {*made}), _fresh(value, asking, taken))
                for _ in range(asking.size)
            ]
            for at, needle in zip(
                sorted(rng.sample(range(asking.size), len(needles)), reverse=True), needles, strict=True
            ):
                lines.insert(at, needle)
            context = "\n".join(lines)
        asked = rng.sample(list(made), queries)
        query = asked[0] if queries == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        one = queries * values == 1
        kind = value[:-1] if one else value
        begin, hidden, what = ("A", "is", "is") if one else ("Some", "are", "are all")
        return Drawn(
            f"{begin} special magic {kind} {hidden} hidden within the following text. Make sure to memorize it. I will "
            f"quiz you about the {kind} afterwards.\n{context}\n",
            f"What {what} the special magic {kind} for {query} mentioned in the provided text?",
            f" The special magic {kind} for {query} mentioned in the provided text {hidden}",
            tuple(each for name in asked for each in made[name]),
        )

    return draw


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _random(kind: str, asking: Asking) -> str:
    rng = asking.rng
    if kind == "words":
        return asking.text.key(rng)
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _fresh(kind: str, asking: Asking, taken: set[str]) -> str:
    """Return a key or value that is not taken yet, and take it."""
    while (found := _random(kind, asking)) in taken:
        pass
    taken.add(found)
    return found


def _among_sentences(essay: str, needles: Sequence[str], rng: random.Random) -> str:
    """Put needles between the sentences of an essay, at depths that are drawn among forty."""
    sentences = re.split(r"(?<=[.!?]) ", essay)
    depths = [round(100 * i / 39) for i in range(40)]
    at = [0, *sorted(len(sentences) * depth // 100 for depth in rng.sample(depths, len(needles))), len(sentences)]
    parts: list[str] = []
    for i in range(1, len(at)):
        parts.append(" ".join(sentences[at[i - 1] : at[i]]))
        parts += needles[i - 1 : i]
    return " ".join(part for part in parts if part)


# -- variables --------------------------------------------------------------------------------------------------------

_HOPS: Final = 4


def _variables(asking: Asking) -> Drawn:
    example, right = _chain(asking.rng, asking.example, 3)
    drawn, answers = _chain(asking.rng, asking.size, 5)
    shown = f"{example.context}{example.question}{example.prefix} {' '.join(right)}\n"
    return Drawn(f"{shown}\n{drawn.context}", drawn.question, drawn.prefix, answers)


def _chain(rng: random.Random, size: int, letters: int) -> tuple[Drawn, tuple[str, ...]]:
    names: dict[str, None] = {}
    while len(names) < _HOPS + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    variables, value = list(names), str(rng.randint(10_000, 99_999))
    chain = [f"VAR {variables[0]} = {value}"]
    chain += [f"VAR {later} = VAR {earlier} " for earlier, later in pairwise(variables)]
    lines = [_NOISE] * size
    for moved, (at, step) in enumerate(zip(sorted(rng.sample(range(size), len(chain))), chain, strict=True)):
        lines.insert(at + moved, step)
    context = "\n".join(lines).replace(". \n", ".\n")
    answers = tuple(variables)
    drawn = Drawn(
        f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n",
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        f" Answer: According to the chain(s) of variable assignment in the text above, {len(answers)} variables are "
        f"assigned the value {value}, they are: ",
        answers,
    )
    return drawn, answers


# -- words ------------------------------------------------------------------------------------------------------------

_COMMON: Final = 10


def _common_words(asking: Asking) -> Drawn:
    easy = asking.tokens < _SHORT
    example = _listed_words(asking, *((20, 3, 1) if easy else (40, 10, 3)))
    drawn = _listed_words(asking, asking.size, *((6, 1) if easy else (30, 3)))
    shown = " ".join(f"{i + 1}. {word}" for i, word in enumerate(example.answers))
    before = f"{example.context}{example.question}{example.prefix} {shown}\n"
    return Drawn(before + drawn.context, drawn.question, drawn.prefix, drawn.answers)


def _listed_words(asking: Asking, count: int, often: int, seldom: int) -> Drawn:
    words = asking.text.different(count, asking.rng)
    listed = words[:_COMMON] * often + words[_COMMON:] * seldom
    asking.rng.shuffle(listed)
    context = " ".join(f"{i + 1}. {word}" for i, word in enumerate(listed))
    return Drawn(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{context}\n",
        "Question: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        tuple(words[:_COMMON]),
    )


def _frequent_words(asking: Asking) -> Drawn:
    rng = asking.rng
    vocabulary: dict[str, None] = {}
    while len(vocabulary) < max(8, asking.tokens // 50):
        vocabulary["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    words = ["...", *list(vocabulary)[1:]]  # the most frequent one is noise
    # Zipf's law with exponent 2, normalised by zeta(2).
    text = [word for rank, word in enumerate(words, 1) for _ in range(int(asking.size / rank**2 / (pi**2 / 6)))]
    rng.shuffle(text)
    return Drawn(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(text)}\n",
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        tuple(words[1:4]),
    )


# -- documents --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DocumentQuestion:
    """A question about documents.

    Attributes:
        question: the question.
        answers: all right answers.
        needed: numbers of the documents that are always there.
        near: numbers of documents that are taken before others.
    """

    question: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...] = ()


def documents(asked: DocumentQuestion, texts: Sequence[str], size: int, rng: random.Random) -> Drawn:
    """Return a question with so many documents before it, or as many as there are."""
    chosen = list(asked.needed)
    near = [number for number in asked.near if number not in chosen]
    more = size - len(chosen)
    if more > len(near):
        left = min(more - len(near), len(texts) - len(chosen) - len(near))
        known = {*chosen, *near}
        while left > 0:  # of very many documents few are taken
            number = rng.randrange(len(texts))
            if number not in known:
                known.add(number)
                near.append(number)
                left -= 1
        chosen += near
    else:
        chosen += rng.sample(near, max(more, 0))
    rng.shuffle(chosen)
    context = "\n\n".join(f"Document {i + 1}:\n{texts[number]}" for i, number in enumerate(chosen))
    task = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    return Drawn(
        f"{task}\n\nThe following are given documents.\n\n{context}\n\n",
        f"{task}\n\nQuestion: {asked.question}",
        " Answer:",
        asked.answers,
    )


FORMS: Final[Mapping[str, Form]] = {
    "niah_single_1": Form(_needles("noise"), 128, 1),
    "niah_single_2": Form(_needles("essay"), 128, 1),
    "niah_single_3": Form(_needles("essay", value="uuids"), 128, 1),
    "niah_multikey_1": Form(_needles("essay", keys=4), 128, 1),
    "niah_multikey_2": Form(_needles("needle"), 128, 1),
    "niah_multikey_3": Form(_needles("needle", key="uuids", value="uuids"), 128, 1),
    "niah_multivalue": Form(_needles("essay", values=4), 128, 1),
    "niah_multiquery": Form(_needles("essay", queries=4), 128, 1),
    "vt": Form(_variables, 30, _HOPS + 1, example=True),
    "cwe": Form(_common_words, 120, 2 * _COMMON),
    "fwe": Form(_frequent_words, 50, 60),
}
"""The eleven tasks that are generated, in the order of ``synthetic.yaml``."""

EXAMPLE_TOKENS: Final = 500
"""Length of the solved example of ``vt``."""


def example(rng: random.Random, size: int) -> str:
    """Return a solved example of ``vt`` with so many lines of noise, to measure it."""
    drawn, answers = _chain(rng, size, 3)
    return f"{drawn.context}{drawn.question}{drawn.prefix} {' '.join(answers)}\n"
