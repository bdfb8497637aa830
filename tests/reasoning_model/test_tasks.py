"""The generator: deterministic, right by an independent reading of the prompt, splits that never meet."""

from __future__ import annotations

import hashlib
import itertools
import random
import re

import pytest

from kvpolicy.errors import KVPolicyError
from kvpolicy.study.tasks import APART, LEVELS, REDUNDANCIES, Size, draw, grade, problems
from kvpolicy.study.wording import NAMES, REST, RESTATE, STOP, vocabulary

RESTATED = "restated-recall"
TIMES = REDUNDANCIES[RESTATED]
CELLS = [(family, level, times) for family in LEVELS for level in LEVELS[family] for times in REDUNDANCIES[family]]
KINDS = [(family, redundancy) for family, level, redundancy in CELLS if level == "medium"]


def length(problem):
    """Tokens of a problem, <bos> and <eos> among them."""
    return len(f"{problem.prompt} {problem.solution}".split()) + 2


def drawn(family, level, split, count, redundancy, **rest):
    return list(problems(family, level, split, count, redundancy=redundancy, **rest))


LINE = rf"(?:{'|'.join(NAMES)}) \d (?:{'|'.join(NAMES)}) (?:{'|'.join((*NAMES, STOP))})"


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


def recomputed(prompt):
    """Answer of a restated-recall problem: the lines say the same, whatever ends them."""
    return computed(re.sub(r" (?:once|double)(?= )", " .", prompt))


SOLVE = {"prompt-recall": walked, "trace-recall": computed, RESTATED: recomputed}


@pytest.mark.parametrize(("family", "level", "redundancy"), CELLS)
def test_answers_are_right(family, level, redundancy):
    for problem in drawn(family, level, "test", 40, redundancy):
        assert problem.answer == SOLVE[family](problem.prompt)
        assert problem.solution.endswith(f"</think> the answer is {problem.answer} .")
        assert grade(problem, problem.solution) == grade(problem, f"{problem.solution} <eos> and more")
        assert grade(problem, problem.solution).exact
        assert grade(problem, problem.solution).progress == 1


@pytest.mark.parametrize(("family", "level", "redundancy"), CELLS)
def test_every_sum_and_every_quoted_line_is_right(family, level, redundancy):
    sums, quoted = 0, 0
    for problem in drawn(family, level, "development", 20, redundancy):
        text = problem.solution
        for before, digit, after in re.findall(r"((?:\d )?\d) plus (\d) (?:is|makes) ((?:\d )?\d)\b", text):
            number = int(before.replace(" ", "")) + int(digit)
            assert number % 10 ** len(after.split()) == int(after.replace(" ", ""))
            sums += 1
        if family == RESTATED:
            # With what ends it, so that what is read says how often values are said again.
            lines = re.findall(rf"{LINE} (?:\.|once|double)", problem.prompt.partition("list :")[2])
            found = re.findall(rf"\b({LINE} \S+)", text)
        else:
            lines = re.findall(r"\w+ \d \w+(?: \w+)?(?= \.)", problem.prompt.partition("list :")[2])
            found = re.findall(r"\b(\w+ \d \w+(?: \w+)?) [.,]", text)
        for line in found:
            if line.split()[0] in NAMES:
                assert line in lines
                quoted += 1
    assert sums > 20
    assert quoted >= 20 * LEVELS[family][level].steps


def test_same_seed_same_problem():
    for family, level, redundancy in CELLS:
        five = drawn(family, level, "test", 5, redundancy)
        assert drawn(family, level, "test", 5, redundancy) == five
        assert drawn(family, level, "test", 2, redundancy, first=3) == five[3:]
        assert len({p.prompt for p in drawn(family, level, "test", 50, redundancy)}) == 50


def test_published_problems_do_not_change():
    """Tables refer to these problems and the shipped model has learned these words."""
    firsts = [drawn(family, level, "test", 1, times)[0] for family, level, times in CELLS if family != RESTATED]
    assert firsts[0].prompt == (
        "problem : start at hal with 0 6 . list : ben 9 gus . hal 2 ben . pat 9 stop . ann 4 gus . "
        "gus 2 stop . find the final total . <think>"
    )
    everything = "\n".join(f"{p.prompt} {p.solution}" for p in firsts)
    assert hashlib.sha256(everything.encode()).hexdigest()[:16] == "b141da863891fde4"
    firsts = [drawn(family, level, "test", 1, times)[0] for family, level, times in CELLS if family == RESTATED]
    assert firsts[-1].prompt.startswith("problem : start at ")
    everything = "\n".join(f"{p.prompt} {p.solution}" for p in firsts)
    assert hashlib.sha256(everything.encode()).hexdigest()[:16] == "ce887174b50f1590"


@pytest.mark.parametrize("level", LEVELS[RESTATED])
@pytest.mark.parametrize("times", TIMES)
def test_values_are_said_again_as_often_as_declared(level, times):
    """By the words alone: between the step that computes a value and the step that needs it."""
    for problem in drawn(RESTATED, level, "test", 20, times):
        names = re.findall(r"so we have (\w+) is \d and we go to", problem.solution)
        after = re.split(r"so we have \w+ is \d and we go to \w+ \.", problem.solution)[1:]
        assert len(names) == LEVELS[RESTATED][level].steps
        needed = 0
        for index, said in enumerate(re.findall(r"so we have (\w+ is \d) and", problem.solution)):
            name = said.split()[0]
            between = after[index : index + APART]
            if index + APART < len(names):
                # The use is the last mention before the conclusion of the fourth step after.
                needed += 1
                *full, last = between
                before, use, _ = last.rpartition(f"{said} .")
                assert use
                assert sum(text.count(f"{said} ") for text in (*full, before)) == times
            else:
                *full, last = between
                last = last.partition("</think>")[0]
                assert 1 <= sum(text.count(f"{said} ") for text in (*full, last)) <= times
            assert not re.search(rf"\b{name} is (?!{said[-1]})", problem.solution)
        assert needed == len(names) - APART


@pytest.mark.parametrize("level", LEVELS[RESTATED])
def test_at_all_redundancies_it_is_one_problem(level):
    """Same names, values and answers, so that redundancies are compared pair by pair; and about the same length."""
    cells = [drawn(RESTATED, level, "test", 20, times) for times in TIMES]
    for same in zip(*cells, strict=True):
        bare = {re.sub(r" (?:once|double)(?= )", " .", p.prompt) for p in same}
        assert len(bare) == 1
        assert len({p.answer for p in same}) == 1
        assert len({len(p.prompt.split()) for p in same}) == 1
        sizes = list(map(length, same))
        assert max(sizes) <= 1.08 * min(sizes)


def test_words_about_nothing_are_as_long_as_four_values():
    """Give or take a word, and with nothing in them that a problem is about."""
    four = " , ".join(f"{name} is 3" for name in NAMES[:APART])
    for first, second in REST:
        assert abs(len(first.split()) - len(RESTATE[0].format(values=four).split())) <= 1
        assert abs(len(second.split()) - len(RESTATE[1].format(values=four).split())) <= 1
        assert not {*first.split(), *second.split()} & {*NAMES, *map(str, range(10))}


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


@pytest.mark.parametrize(("family", "level", "redundancy"), CELLS)
def test_lengths(family, level, redundancy):
    longest = max(map(length, drawn(family, level, "test", 50, redundancy)))
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


@pytest.mark.parametrize(("family", "redundancy"), KINDS)
def test_grade_sees_what_is_wrong(family, redundancy):
    (problem,) = drawn(family, "medium", "test", 1, redundancy)
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
        (("restated-recall", "short", "test", 1), "redundancy: restated-recall needs one of 1, 2, 4, 8, got nothing"),
    ],
)
def test_unknown_names_are_refused(arguments, named):
    with pytest.raises(KVPolicyError, match=named):
        problems(*arguments)


@pytest.mark.parametrize(
    ("family", "redundancy", "named"),
    [
        (RESTATED, 3, "one of 1, 2, 4, 8, got 3"),
        (RESTATED, "4", "got '4'"),
        ("trace-recall", 1, "trace-recall has none"),
    ],
)
def test_redundancy_is_one_that_there_is(family, redundancy, named):
    with pytest.raises(KVPolicyError, match=f"redundancy: .*{named}"):
        problems(family, "short", "test", 1, redundancy=redundancy)


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("prompt-recall", Size(0)),
        ("prompt-recall", Size(20, distractors=5)),
        ("trace-recall", Size(24)),
        ("trace-recall", Size(3, asked=4)),
        (RESTATED, Size(24)),
        (RESTATED, Size(0)),
        (RESTATED, Size(9, asked=APART + 1)),
    ],
)
def test_sizes_that_cannot_be_are_refused(family, size):
    with pytest.raises(KVPolicyError, match="size:"):
        draw(random.Random(0), family, size)
