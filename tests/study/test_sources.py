from __future__ import annotations

import json

import pytest

from kvpolicy import KVPolicyError
from kvpolicy.spec.problems import FieldError
from kvpolicy.study.grading import grade
from kvpolicy.study.needles import needle
from kvpolicy.study.problem import Problem
from kvpolicy.study.sources import read_source

pytest.importorskip("datasets")


def source(folder=None, **fields):
    return read_source(fields, ("datasets", 0), folder)


def test_json_lines_with_named_fields(folder):
    made = source(folder, use="jsonl", path="sums.jsonl", question="problem", template="Q: {question} {not a field}")
    first, *others = made.problems(5, 0)
    assert len(others) == 4
    assert first.prompt == f"Q: What is {first.index} plus {3 * first.index}? {{not a field}}"
    assert first.answer == str(4 * first.index)
    assert made.problems(3, 7) == [first, *others[:2]]  # a smaller sample is the beginning of a larger one
    assert len(made.problems(100, 0)) == 12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"question": "problm"},
            (
                r"sums.jsonl has no field 'problm' for `question`\. Did you mean 'problem'\? "
                r"Its fields are problem, answer; write `question: FIELD`\."
            ),
        ),
        ({"question": "problem", "answer": "x"}, r"sums.jsonl has no field 'x' for `answer`\. Its fields are"),
        ({"path": "none.jsonl"}, r"there is no file .*none.jsonl; correct `path`, which is relative to the study file"),
        ({"path": "broken.jsonl"}, r"broken.jsonl cannot be read: "),
        ({"path": "gap.jsonl", "question": "problem"}, r"row 1, has nothing in its field 'answer'; complete it"),
        ({"question": "problem", "answer_after": "###"}, r"row \d+, has no '###' in its field 'answer'; correct"),
        ({"path": "empty.jsonl"}, r"^datasets: .*empty.jsonl is empty; name another file\.$"),
    ],
)  # fmt: skip
def test_bad_data_is_said_in_one_sentence(folder, fields, message):
    (folder / "broken.jsonl").write_text('{"problem": "x"\n')
    (folder / "empty.jsonl").write_text("\n")
    (folder / "gap.jsonl").write_text('{"problem": "x", "answer": null}\n')
    with pytest.raises(KVPolicyError, match=message) as caught:
        source(folder, **{"use": "jsonl", "path": "sums.jsonl", **fields}).problems(1, 0)
    assert "\n" not in str(caught.value)


def test_well_known_datasets_from_a_local_copy(folder):
    row = {"question": "How many?", "answer": "First 3.\nThen 4.\n#### 7"}
    (folder / "gsm.jsonl").write_text(json.dumps(row))
    (problem,) = source(folder, use="gsm8k", path="gsm.jsonl").problems(10, 0)
    assert problem.answer == "7"
    assert problem.prompt.startswith("How many?\n\nPlease reason step by step")
    assert problem.dataset == "gsm8k"


def test_a_hub_that_is_out_of_reach_is_said_in_one_sentence():
    with pytest.raises(KVPolicyError, match=r"^datasets: no/such-thing, split test cannot be read: ") as caught:
        source(use="hub", id="no/such-thing").problems(1, 0)
    assert "\n" not in str(caught.value)


def test_free_text(folder):
    (folder / "more.jsonl").write_text('{"body": "one"}\n{"body": "two\\nlines"}\n')
    made = source(folder, use="text", path=["cat.txt", "more.jsonl"], field="body", tokens=20, prompt_tokens=5)
    texts = made.problems(9, 0)
    assert [p.text for p in texts] == [(folder / "cat.txt").read_text(), "one", "two\nlines"]
    assert texts[0].cut == (5, 20)
    assert not made.generates


def test_a_text_that_is_not_there_is_not_the_word_none(folder):
    (folder / "gap.jsonl").write_text('{"text": "A text."}\n{"text": null}\n')
    with pytest.raises(KVPolicyError, match=r"gap.jsonl, row 2, has nothing in its field 'text'"):
        source(folder, use="text", path="gap.jsonl").problems(2, 0)


def test_seeds_give_fresh_generated_problems():
    made = source(use="generator", family="trace-recall", level="short")
    both = [*made.problems(3, 0), *made.problems(3, 1)]
    assert [p.index for p in both] == list(range(6))
    assert len({p.digest for p in both}) == 6
    assert grade(both[0], both[0].solution) == {"exact": 1.0, "progress": 1.0}
    assert grade(both[0], both[1].solution)["exact"] == 0.0
    assert made.label == "trace-recall-short"
    assert source(use="generator", family="trace-recall", level="short", split="development").label.endswith(
        "-development"
    )


def test_redundancy_is_part_of_the_name():
    made = source(use="generator", family="restated-recall", level="medium", redundancy=4)
    assert made.label == "restated-recall-medium-r4"
    other = source(use="generator", family="restated-recall", level="medium", redundancy=1)
    (one,), (same,) = made.problems(1, 0), other.problems(1, 0)
    assert one.digest != same.digest
    assert one.answer == same.answer
    assert grade(one, one.solution) == {"exact": 1.0, "progress": 1.0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"family": "restated-recall"}, "redundancy: restated-recall needs one of 1, 2, 4, 8, got nothing."),
        ({"family": "restated-recall", "redundancy": 3}, "redundancy"),
        ({"family": "prompt-recall", "redundancy": 2}, "redundancy: prompt-recall has none"),
    ],
)
def test_redundancy_that_there_is_not(given, said):
    with pytest.raises(FieldError, match=said):
        source(use="generator", **given)


def test_needles():
    text, question, answer = needle(3, 200, 5)
    assert (text, question, answer) == needle(3, 200, 5)
    assert text.count("The secret number of ") == 5
    place = question.rpartition("secret number of ")[2].partition("?")[0]
    assert f"The secret number of {place} is {answer}." in text
    assert 150 < len(text.split()) < 260
    assert len({needle(i, 50, 1)[0] for i in range(50)}) == 50


@pytest.mark.parametrize(
    ("grader", "answer", "output", "exact"),
    [
        ("number", "4821", "The number is 4821.", 1),
        ("number", "4821", "It is 4,821", 1),
        ("number", "4821", "1234, or 4821", 0),
        ("number", "4821", "none", 0),
        ("text", "Blue whale", " blue  WHALE.", 1),
        ("text", "Blue whale", "a blue whale", 0),
    ],
)
def test_grading(grader, answer, output, exact):
    assert grade(Problem("d", 0, "q", answer, grader), output) == {"exact": exact}


@pytest.mark.parametrize(
    ("answer", "output", "exact"),
    [
        (r"\left( 3, \frac{\pi}{2} \right)", r"so the point is \boxed{(3, \pi/2)}.", 1),
        (r"\frac{1}{2}", r"thus $x = 0.5$", 1),
        ("18", "We add them. The answer is 18.", 1),
        (r"$\boxed{18}$", r"\boxed{18}", 1),
        ("18", r"\boxed{19}", 0),
        ("18", "I do not know.", 0),
    ],
)
def test_mathematics_is_graded_by_value(answer, output, exact):
    pytest.importorskip("math_verify")
    assert grade(Problem("d", 0, "q", answer, "math"), output) == {"exact": exact}


@pytest.mark.parametrize(
    ("source", "remote"),
    [
        ("gsm8k", "openai/gsm8k"),
        ({"use": "gsm8k", "path": "x.jsonl"}, None),
        ({"use": "text", "path": "x.txt"}, None),
        ({"use": "text", "id": "some/text"}, "some/text"),
        ({"use": "needle"}, None),
    ],
)
def test_what_is_read_from_the_hub_is_known(source, remote):
    assert read_source(source, (), None).remote == remote
