"""RULER: a rule that reads the prompt alone answers every generated problem, and a wrong one none."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from kvpolicy import KVPolicyError
from kvpolicy.study.benchmarks.prose import Haystack
from kvpolicy.study.benchmarks.ruler import TASKS
from kvpolicy.study.benchmarks.ruler_tasks import FORMS
from kvpolicy.study.grading import grade
from kvpolicy.study.models import find_model, measure_of
from kvpolicy.study.source import TextMeasure
from kvpolicy.study.sources import read_source


class Pieces:
    """A tokenizer whose tokens are words and marks, or single characters."""

    chat_template = None

    def __init__(self, pattern=r"\w+|[^\w\s]|\s"):
        self.pattern = pattern

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [*(["<bos>"] if add_special_tokens else []), *re.findall(self.pattern, text, re.DOTALL)]}


WORDS, CHARACTERS = TextMeasure(Pieces()), TextMeasure(Pieces("."))


def ruler(**fields):
    return read_source({"use": "ruler", **fields}, ("datasets", 0), None)


def found(prompt):
    """Return what the rules find in a prompt, the right answers first: (right, wrong)."""
    if "special magic" in prompt:
        needles = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.(?=\s|$)", prompt)
        query = re.search(r"for (\S+(?:, \S+)*(?:, and \S+)?) mentioned in the provided text\?$", prompt)[1]
        asked = set(re.split(r", and |, ", query))
        right = [value for key, value in needles if key in asked]
        return right, [value[::-1] + "x" for value in right]
    last = prompt.rpartition("\nQuestion: ")[0]
    if "variable assignment" in prompt:
        last = last.rpartition("Memorize and track")[2]
        value = re.search(r"assigned the value (\d+) in", prompt.rpartition("\n")[2])[1]
        pairs = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+) ?\.?$", last, re.MULTILINE)
        holds = {value}
        for _ in pairs:
            holds |= {name for name, of in pairs if of in holds}
        return sorted(holds - {value}), [name[::-1] + "0" for name, _ in pairs]
    if "numbered list of words" in prompt:
        last = last.rpartition("Memorize the ones that appear most often.\n")[2]
        counts = Counter(re.findall(r"\d+\. (\S+)", last)).most_common()
        return [word for word, _ in counts[:10]], [word for word, _ in counts[10:20]]
    counts = Counter(last.rpartition("frequently appeared coded words. ")[2].split()).most_common()
    assert counts[0][0] == "..."
    return [word for word, _ in counts[1:4]], [word for word, _ in counts[4:7]]


@pytest.mark.parametrize("task", FORMS)
@pytest.mark.parametrize(
    ("measure", "tokens"),
    [(WORDS, 2048), (WORDS, 6000), (CHARACTERS, 12000)],
    ids=["words-2048", "words-6000", "characters-12000"],
)
def test_rules_that_read_the_prompt_answer_every_problem(task, measure, tokens):
    made = ruler(tasks=[task], tokens=tokens)
    problems = [*made.problems(5, 0, measure), *made.problems(5, 1, measure)]
    assert len({p.index for p in problems}) == len({p.digest for p in problems}) == 10
    for p in problems:
        right, wrong = found(p.prompt)
        assert grade(p, " ".join(right)) == {"score": 1.0, "exact": 1.0}
        assert sorted(right) == sorted(p.answers)
        assert grade(p, " ".join(wrong)) == {"score": 0.0, "exact": 0.0}
        assert grade(p, "") == {"score": 0.0, "exact": 0.0}
        length = measure.frame(chat=None) + measure.count(p.prompt + p.prefix) + p.most_tokens
        assert length <= tokens, "longer than was asked for"
        assert length > 0.9 * tokens, "much shorter than was asked for"
        question = p.prompt[p.question_at :]
        assert question.startswith(("What is the special", "What are all the special", "Question: "))
        assert not p.prompt[: p.question_at].endswith(" ")


def test_prompts_are_those_of_the_repository():
    by_task = {p.task: p for p in ruler(tokens=4096).problems(11, 0, WORDS)}
    one, four = by_task["niah_single_1"], by_task["niah_multiquery"]
    key = re.search(r"number for (\S+) mentioned", one.prompt)[1]
    assert one.prompt.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the number afterwards.\nThe grass is green. The sky is blue. The sun is yellow. Here we go. "
        "There and back again.\n"
    )
    assert one.prompt.endswith(f"\nWhat is the special magic number for {key} mentioned in the provided text?")
    assert one.prefix == f" The special magic number for {key} mentioned in the provided text is"
    assert f"One of the special magic numbers for {key} is: {one.answer}." in one.prompt
    assert four.prompt.startswith("Some special magic numbers are hidden within the following text.")
    assert re.search(r"What are all the special magic numbers for \S+, \S+, \S+, and \S+ mentioned in", four.prompt)
    assert four.prefix.endswith("mentioned in the provided text are")
    assert len(four.answers) == 4
    uuids = by_task["niah_multikey_3"]
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", uuids.answer)
    assert by_task["vt"].prefix.endswith(", they are: ")
    assert by_task["vt"].prompt.count("Memorize and track") == 2  # a solved example comes first
    assert by_task["cwe"].prompt.count("10 most common words") == 2
    assert by_task["cwe"].answer in by_task["cwe"].prompt
    assert {p.most_tokens for p in by_task.values()} == {128, 30, 120, 50}
    assert {p.chat for p in by_task.values()} == {None}


def test_problems_do_not_depend_on_how_many_are_asked_for():
    made = ruler(tokens=1024)
    assert made.label == "ruler-1k-11-tasks"
    many = made.problems(22, 0, WORDS)
    assert [p.task for p in many] == [*FORMS, *FORMS]
    assert made.problems(7, 0, WORDS) == many[:7]
    assert ruler(tokens=1024, tasks=["fwe"]).problems(1, 0, WORDS)[0].prompt == many[10].prompt


def test_needles_of_a_real_model_fit_its_template():
    pytest.importorskip("gguf")
    measure = measure_of(find_model("smollm2", "auto", "cpu"))
    assert measure.window == 8192
    for p in ruler(tokens=1024).problems(11, 0, measure):
        right, _ = found(p.prompt)
        assert grade(p, "\n".join(right))["exact"] == 1.0
        messages = [{"role": "user", "content": p.prompt}]
        made = measure.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert 900 < len(made["input_ids"]) + measure.count(p.prefix) + p.most_tokens <= 1024


def test_essays_and_words_of_a_text_of_ones_own(tmp_path):
    words = [f"{a}{b}{c}a" for a in "bcdfghkl" for b in "aeiou" for c in ("ng", "rt", "st", "lm", "nd", "rk")]
    (tmp_path / "essay.txt").write_text(". ".join(word.capitalize() for word in words))
    made = read_source({"use": "ruler", "tokens": 2048, "text": "essay.txt"}, ("datasets", 0), tmp_path)
    by_task = {p.task: p for p in made.problems(11, 0, WORDS)}
    assert "Banga. Barta." in by_task["niah_single_2"].prompt
    assert set(by_task["cwe"].answers) <= {*words}
    for p in by_task.values():
        assert grade(p, " ".join(found(p.prompt)[0]))["exact"] == 1.0
    (tmp_path / "short.txt").write_text("Only a few words here.")
    with pytest.raises(
        KVPolicyError, match=r"short\.txt has 3 different words .*; ruler needs a text with at least 200"
    ):
        ruler(text=str(tmp_path / "short.txt"), tokens=1024).problems(11, 0, WORDS)


def test_prose_is_always_the_same_and_does_not_repeat_itself():
    text = Haystack(None).essay(30_000)
    assert text.startswith(Haystack(None).essay(100))
    sentences = re.split(r"(?<=[.!?]) ", text)
    assert len(set(sentences)) > 0.97 * len(sentences)
    assert not re.search(r"[{}]|\ba [aeiou]|\ban [^aeiou]", text)


SQUAD = {
    "data": [
        {
            "title": f"T{t}",
            "paragraphs": [
                {
                    "context": f"Paragraph {t} {i} says that the answer is gold{t}{i}. " * 20,
                    "qas": [
                        {"question": f"Which {t} {i}?", "answers": [{"text": f"gold{t}{i}"}], "is_impossible": False},
                        {"question": "None?", "answers": [], "is_impossible": True},
                    ],
                }
                for i in range(4)
            ],
        }
        for t in range(5)
    ]
}
HOTPOT = [
    {
        "question": f"Who {i}?",
        "answer": f"Anna{i}",
        "context": [[f"D{i}{j}", [f"Sentence {j} names Anna{i}. ", "It goes on. "]] for j in range(10)],
    }
    for i in range(20)
]


def test_questions_about_documents(tmp_path):
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps(HOTPOT))
    made = read_source(
        {"use": "ruler", "tokens": 1500, "path": ".", "tasks": ["qa_1", "qa_2"]}, ("datasets", 0), tmp_path
    )
    assert made.remote is None
    problems = made.problems(10, 0, WORDS)
    assert [p.task for p in problems] == ["qa_1", "qa_2"] * 5
    for p in problems:
        assert p.prompt.startswith("Answer the question based on the given documents. Only give me the answer")
        assert "\n\nDocument 1:\n" in p.prompt
        assert p.answer in p.prompt[: p.question_at]
        assert p.prompt[p.question_at :].rpartition("\n\n")[2].startswith("Question: Wh")
        assert grade(p, f"it is {p.answer.upper()}!") == {"score": 1.0, "exact": 1.0}
        assert grade(p, "none")["score"] == 0.0
        assert 1500 >= WORDS.count(p.prompt) + 32 > 1000
    assert len(made.problems(1000, 0, WORDS)) == 40  # all there are
    whole = read_source({"use": "ruler", "tokens": 1500, "path": "."}, ("datasets", 0), tmp_path)
    assert whole.chosen == TASKS
    assert whole.label == "ruler-1500"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ["qa_1"], "path": "nowhere"}, r"nowhere has no file squad.json or dev-v2.0.json, which qa_1 needs"),
        ({"tasks": ["qa_1"], "path": "odd"}, r"squad.json is not in the format that squad.json of RULER has"),
        ({"tasks": ["qa_2"], "path": "odd"}, r"hotpotqa.json has no question with an answer in it"),
        (
            {"tasks": ["cwe"], "tokens": 256},
            r"ruler-256-cwe: cwe does not fit into 256 tokens of this model's tokenizer",
        ),
        ({"tokens": 9000}, r"ruler-9000-11-tasks is longer than the 8,192 tokens that the model takes; write fewer"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_sentence(tmp_path, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "squad.json").write_text('{"rows": []}')
    (tmp_path / "odd" / "hotpotqa.json").write_text("[]")
    with pytest.raises(KVPolicyError, match=message) as caught:
        ruler(**fields).problems(3, 0, TextMeasure(Pieces(), 8192))
    assert "\n" not in str(caught.value)


def test_the_documents_are_on_the_hub_if_not_here():
    assert ruler().remote is None
    assert ruler(tasks=["qa_1", "qa_2"]).remote == "rajpurkar/squad_v2, hotpotqa/hotpot_qa"
    assert len(TASKS) == 13
