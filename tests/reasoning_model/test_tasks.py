"""The generator: deterministic, right by an independent reading of the prompt, splits that never meet."""

from __future__ import annotations

import hashlib
import itertools
import random
import re

import pytest

from kvpolicy.errors import KVPolicyError
from kvpolicy.study.tasks import LEVELS, Size, draw, grade, problems
from kvpolicy.study.wording import NAMES, STOP, vocabulary

CELLS = [(family, level) for family, levels in LEVELS.items() for level in levels]


def walked(prompt):
    """Answer of a prompt-recall problem, from the words of its prompt alone."""
    words = prompt.split()
    place, total = words[words.index("at") + 1], int("".join(words[words.index("with") + 1 :][:2]))
    link = {n: (int(d), m) for n, d, m in re.findall(r"(\w+) (\d) (\w+) \.", prompt)}
    while place != STOP:
        digit, place = link[place]
        total += digit
    return " ".join(f"{total % 100:02}")


def computed(prompt):
    """Answer of a trace-recall problem, from the words of its prompt alone."""
    root, value = re.search(r"\. (\w+) is (\d) \.", prompt).groups()
    line = {n: (int(d), p) for n, d, p in re.findall(r"(\w+) (\d) (\w+) \w+ \.", prompt)}

    def evaluate(name):
        return int(value) if name == root else (line[name][0] + evaluate(line[name][1])) % 10

    asked = re.search(r"find ([\w ,]+) \.", prompt)[1].split(" , ")
    return " , ".join(f"{name} is {evaluate(name)}" for name in asked)


SOLVE = {"prompt-recall": walked, "trace-recall": computed}


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_answers_are_right(family, level):
    for problem in problems(family, level, "test", 40):
        assert problem.answer == SOLVE[family](problem.prompt)
        assert problem.solution.endswith(f"</think> the answer is {problem.answer} .")
        assert grade(problem, problem.solution) == grade(problem, f"{problem.solution} <eos> and more")
        assert grade(problem, problem.solution).exact
        assert grade(problem, problem.solution).progress == 1


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_every_sum_and_every_quoted_line_is_right(family, level):
    sums, quoted = 0, 0
    for problem in problems(family, level, "development", 20):
        text = problem.solution
        for before, digit, after in re.findall(r"((?:\d )?\d) plus (\d) (?:is|makes) ((?:\d )?\d)\b", text):
            number = int(before.replace(" ", "")) + int(digit)
            assert number % 10 ** len(after.split()) == int(after.replace(" ", ""))
            sums += 1
        lines = re.findall(r"\w+ \d \w+(?: \w+)?(?= \.)", problem.prompt.partition("list :")[2])
        for line in re.findall(r"\b(\w+ \d \w+(?: \w+)?) [.,]", text):
            if line.split()[0] in NAMES:
                assert line in lines
                quoted += 1
    assert sums > 20
    assert quoted >= 20 * LEVELS[family][level].steps


def test_same_seed_same_problem():
    for family, level in CELLS:
        assert list(problems(family, level, "test", 5)) == list(problems(family, level, "test", 5))
        assert list(problems(family, level, "test", 2, first=3)) == list(problems(family, level, "test", 5))[3:]
        assert len({p.prompt for p in problems(family, level, "test", 50)}) == 50


def test_published_problems_do_not_change():
    """Tables refer to these problems and the shipped model has learned these words."""
    firsts = [next(iter(problems(family, level, "test", 1))) for family, level in CELLS]
    assert firsts[0].prompt == (
        "problem : start at hal with 0 6 . list : ben 9 gus . hal 2 ben . pat 9 stop . ann 4 gus . "
        "gus 2 stop . find the final total . <think>"
    )
    everything = "\n".join(f"{p.prompt} {p.solution}" for p in firsts)
    assert hashlib.sha256(everything.encode()).hexdigest()[:16] == "b141da863891fde4"


@pytest.mark.parametrize("family", LEVELS)
def test_no_problem_is_in_two_splits(family):
    # So few steps and digits that the same problems come up again and again.
    rng = random.Random(0)
    size = Size(1)
    seen = {
        split: {draw(rng, family, size, split=split, digits=(1,)).prompt for _ in range(2000)}
        for split in ("train", "development", "test")
    }
    assert min(map(len, seen.values())) > 150
    for one, other in itertools.combinations(seen.values(), 2):
        assert not one & other


@pytest.mark.parametrize(("family", "level"), CELLS)
def test_lengths(family, level):
    longest = max(len(f"{p.prompt} {p.solution}".split()) + 2 for p in problems(family, level, "test", 50))
    bounds = {"short": (400, 600), "medium": (900, 1150), "long": (1700, 2000)}
    low, high = bounds[level]
    assert low < longest <= high


def test_words_are_in_the_vocabulary():
    words = set(vocabulary())
    assert len(words) == len(vocabulary())
    rng = random.Random(1)
    for family in LEVELS:
        for form in ("full", "brief", "walk"):
            for _ in range(50):
                problem = draw(rng, family, Size(6, asked=2), form=form)
                assert words >= {*problem.prompt.split(), *problem.solution.split()}


@pytest.mark.parametrize("family", LEVELS)
def test_grade_sees_what_is_wrong(family):
    (problem,) = problems(family, "medium", "test", 1)
    half = grade(problem, problem.solution[: len(problem.solution) // 2])
    assert not half.exact
    assert 0.3 < half.progress < 0.6
    spoilt = problem.solution.replace("next one is", "next one was").replace("so we have", "so we had")
    assert grade(problem, spoilt).progress == 0
    last = LEVELS[family]["medium"].steps
    start = problem.solution.index("so the total" if family == "prompt-recall" else "so we have")
    later = problem.solution[:start] + "hmm . " + problem.solution[start + len("so the total") :]
    # Everything after the first wrong step is worth nothing, however right it looks.
    assert grade(problem, later).progress < 1 / last
    assert grade(problem, "").progress == 0
    head, _, tail = problem.solution.partition("</think>")
    digit = re.search(r"\d", tail)[0]
    other = str((int(digit) + 1) % 10)
    wrong = grade(problem, f"{head}</think>{tail.replace(digit, other, 1)}")
    assert not wrong.exact
    assert wrong.progress == 1
    # The first answer counts, a later better one does not.
    assert not grade(problem, f"</think> the answer is 0 . {problem.solution}").exact


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("prompt", "short", "test", 1), "family: 'prompt'"),
        (("prompt-recall", "tiny", "test", 1), "level: 'tiny'"),
        (("prompt-recall", "short", "held-out", 1), "split: 'held-out'"),
        (("prompt-recall", "short", "test", -1), "count and first"),
    ],
)
def test_unknown_names_are_refused(arguments, named):
    with pytest.raises(KVPolicyError, match=named):
        problems(*arguments)


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("prompt-recall", Size(0)),
        ("prompt-recall", Size(20, distractors=5)),
        ("trace-recall", Size(24)),
        ("trace-recall", Size(3, asked=4)),
    ],
)
def test_sizes_that_cannot_be_are_refused(family, size):
    with pytest.raises(KVPolicyError, match="size:"):
        draw(random.Random(0), family, size)
