"""Every benchmark is read from small files in its published format, made here."""

from __future__ import annotations

import csv
import io
import json

import pytest

from kvpolicy import KVPolicyError
from kvpolicy.spec.problems import FieldError
from kvpolicy.study import json_rows
from kvpolicy.study.benchmarks import BENCHMARKS
from kvpolicy.study.benchmarks.infinitebench import TASKS
from kvpolicy.study.benchmarks.longbench import PROMPTS, longest_answer
from kvpolicy.study.grading import GRADERS, grade, named
from kvpolicy.study.source import TextMeasure
from kvpolicy.study.sources import read_source

pytest.importorskip("datasets")


class Words:
    """A tokenizer of one token per word."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": text.split(" ")}

    def decode(self, tokens, skip_special_tokens=False):
        return " ".join(tokens)


def source(folder=None, **fields):
    return read_source(fields, ("datasets", 0), folder)


def lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("name", ["math-500", "aime-2024", "aime-2025", "aime-2026", "hmmt-2025"])
def test_mathematics(tmp_path, name):
    lines(tmp_path / "m.jsonl", [{"problem_idx": i, "problem": f"What is {i} + 1?", "answer": i + 1} for i in range(3)])
    made = source(tmp_path, use=name, path="m.jsonl")
    problems = made.problems(9, 0)
    assert sorted(p.index for p in problems) == [0, 1, 2]
    assert made.label == name
    for p in problems:
        assert p.prompt.startswith(f"What is {p.index} + 1?\n\nPlease reason step by step")
        assert grade(p, f"so it is \\boxed{{{p.index + 1}}}") == {"exact": 1.0}
        assert grade(p, f"so it is \\boxed{{{p.index}}}") == {"exact": 0.0}


def test_hmmt_is_read_from_two_files(tmp_path):
    for month in ("feb", "nov"):
        row = {"problem_idx": 1, "problem": month, "answer": "\\frac{1}{2}", "problem_type": ["Algebra"]}
        lines(tmp_path / f"{month}.jsonl", [row if month == "feb" else {**row, "more": 1}])
    made = source(tmp_path, use="hmmt-2025", path=["feb.jsonl", "nov.jsonl"])
    assert {p.prompt[:3] for p in made.problems(9, 0)} == {"feb", "nov"}
    assert made.size == 60
    assert made.remote is None


def test_gpqa(tmp_path):
    columns = [
        "Record ID",
        "Question",
        "Correct Answer",
        "Incorrect Answer 1",
        "Incorrect Answer 2",
        "Incorrect Answer 3",
    ]
    with (tmp_path / "gpqa_diamond.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for i in range(40):
            table.writerow([f"r{i}", f"Which {{A}},\n{i}?", f"right {i}", "wrong {B}", "worse", "worst"])
    made = source(tmp_path, use="gpqa-diamond", path="gpqa_diamond.csv")
    problems = made.problems(40, 0)
    assert problems == made.problems(40, 5)
    assert {p.answer for p in problems} == set("ABCD")
    for p in problems:
        assert f"\n{p.answer}) right {p.index}" in p.prompt
        assert f"Which {{A}},\n{p.index}?" in p.prompt
        assert "wrong {B}" in p.prompt
        assert grade(p, f"<think>Answer: {chr(ord(p.answer) ^ 1)}</think> So\nanswer: ${p.answer}$") == {"exact": 1.0}
        assert grade(p, "I do not know.") == {"exact": 0.0}


def test_longbench_2_takes_the_middle_out(tmp_path):
    context = " ".join(f"w{i}" for i in range(1000))
    row = {"_id": "x", "domain": "Code", "question": "What?", "answer": "C", "context": context}
    lines(tmp_path / "data.json", [row | {f"choice_{letter}": f"option {letter}" for letter in "ABCD"}])
    made = source(tmp_path, use="longbench-v2", path="data.json")
    (whole,) = made.problems(1, 0)
    assert whole.prompt[whole.question_at :].startswith("\n</text>\n\nWhat is the correct answer")
    assert (whole.most_tokens, whole.task, made.temperature) == (128, "Code", 0.1)
    (cut,) = made.problems(1, 0, TextMeasure(Words(), 400))
    assert len(cut.prompt.split(" ")) <= 400 - 128
    assert cut.prompt[cut.question_at :] == whole.prompt[whole.question_at :]
    assert "w0 " in cut.prompt
    assert "w999" in cut.prompt
    assert "w500" not in cut.prompt
    (shorter,) = source(tmp_path, use="longbench-v2", path="data.json", truncate=100).problems(
        1, 0, TextMeasure(Words())
    )
    assert len(shorter.prompt.split(" ")) == 99  # the two halves meet in a word
    assert grade(whole, "The correct answer is **(C)**.") == {"exact": 1.0}
    assert grade(whole, "The correct answer is D") == {"exact": 0.0}
    with pytest.raises(KVPolicyError, match=r"an answer of 128 tokens leaves no room for a prompt in the 100 tokens"):
        made.problems(1, 0, TextMeasure(Words(), 100))


RIGHT = {"trec": "Number", "lsht": "体育", "passage_count": "7", "passage_retrieval_zh": "段落3"} | {
    "passage_retrieval_en": "Paragraph 3",
    "lcc": "return x + 1",
    "repobench-p": "return x + 1",
    **dict.fromkeys(("multifieldqa_zh", "dureader", "vcsum"), "北京大学位于北京"),
}


def longbench_row(task, i):
    return {
        "input": f"question {i}",
        "context": f"context {{input}} {i}",
        "answers": [RIGHT.get(task, "the old bridge stands in the valley"), "another"],
        "length": 3,
        "dataset": task,
        "language": "zh" if task in ("vcsum", "dureader", "lsht") or task.endswith("_zh") else "en",
        "all_classes": ["Number", "Number of things", "体育"] if task in ("trec", "lsht") else None,
        "_id": f"{task}{i}",
    }


def test_longbench(tmp_path):
    pytest.importorskip("rouge")
    pytest.importorskip("jieba")
    for task in PROMPTS:
        lines(tmp_path / "data" / f"{task}.jsonl", [longbench_row(task, i) for i in range(3)])
    made = source(tmp_path, use="longbench", path="data")
    assert made.label == "longbench"
    problems = made.problems(42, 0)
    assert len({p.index for p in problems}) == 42
    assert [p.task for p in problems] == [*PROMPTS, *PROMPTS]
    assert made.problems(5, 0) == problems[:5]
    assert len(made.problems(100, 0)) == 63
    for p in problems:
        assert "context {input} " in p.prompt
        assert p.prompt[p.question_at :].count("question") == (
            PROMPTS[p.task].count("{input}") if p.question_at else 0
        ) + (PROMPTS[p.task].partition("{context}")[2].count("question"))
        assert p.most_tokens == longest_answer(p.task)
        assert (p.chat is False) == (p.task in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))
        right, wrong = grade(p, f"{p.answer}\n\n"), grade(p, "123 99 0")
        assert right["score"] == pytest.approx(1.0), p.task
        assert wrong["score"] < 0.5, p.task
        assert "exact" not in right


def test_some_tasks_of_longbench(tmp_path):
    lines(tmp_path / "trec.jsonl", [longbench_row("trec", i) for i in range(3)])
    made = source(tmp_path, use="longbench", path="trec.jsonl", tasks=["trec"])
    assert made.label == "longbench-trec"
    (problem, *_) = made.problems(2, 0)
    assert grade(problem, "\nNumber\nQuestion: Number of things") == {"score": 1.0}
    assert grade(problem, "Number or 体育")["score"] == 0.5
    assert grade(problem, "Number of things")["score"] == 0.5
    kept = source(tmp_path, use="longbench", path=".", tasks=["trec"])
    assert kept.problems(1, 0)[0].prompt == problem.prompt


INFINITE = {
    "passkey": ("What is the pass key?", ["71432"], "71432.", " 1 71432"),
    "number_string": ("What is the sequence?", ["2200012222"], "is 2200012222", "22000"),
    "kv_retrieval": ('Key: "a-b"', ["00a0-11"], '"00a0-11"}', "00a0-12"),
    "longdialogue_qa_eng": ("", ["ACE", "ACE ROTHSTEIN"], " Ace.", "Bob"),
    "longbook_sum_eng": ("", ["He went home.\nShe stayed."], "He went home.\nShe stayed.", "Nothing"),
    "longbook_choice_eng": ("Who?", ["Anna"], "B. Anna", "C"),
    "longbook_qa_eng": ("Who?", ["the Queen", "Anna"], " queen!", "nobody"),
    "longbook_qa_chn": ("谁？", ["王后"], "王后。", "公子"),
    "math_find": ("The largest number of the list is:", [97], " 97,", "9.7"),
    "math_calc": ("", [1, 4, 8], "1, 4, 8", "2"),
    "code_run": ("Please give me the value of func_1(-3).", [7], "= 7.", "8"),
    "code_debug": ("", ["Anna"], " answer is: B", "A."),
}


def test_infinitebench(tmp_path):
    pytest.importorskip("rouge_score")
    assert set(INFINITE) == set(TASKS)
    for task, (question, answer, *_) in INFINITE.items():
        options = ["Otto", "Anna", "Ida", "Uwe"] if task in ("longbook_choice_eng", "code_debug") else []
        rows = [
            {"id": i, "context": "long {text} ", "input": question, "answer": answer, "options": options}
            for i in (0, 1)
        ]
        lines(tmp_path / f"{task}.jsonl", rows)
    problems = source(tmp_path, use="infinitebench", path=".").problems(12, 0)
    assert [p.task for p in problems] == list(TASKS)
    for p in problems:
        _, _, right, wrong = INFINITE[p.task]
        assert p.chat is False
        assert "long {text}" in p.prompt
        assert p.most_tokens == TASKS[p.task].most_tokens
        assert set(grade(p, right).values()) == {1.0}, p.task
        assert set(grade(p, wrong).values()) == {0.0}, p.task
    by_task = {p.task: p.prompt for p in problems}
    assert "The value of func_1(-3) is" in by_task["code_run"]
    assert by_task["math_find"].startswith("What is the largest number in the following list?")
    assert "B. Anna" in by_task["longbook_choice_eng"]
    assert grade(problems[9], "1, 4, 9")["score"] == pytest.approx(2 / 3)


def test_loogle(tmp_path):
    pytest.importorskip("rouge")
    pairs = [{"Q": f"Where {i}?", "A": "in the old town", "S": ["..."]} for i in range(3)]
    cloze = [{"Q": "<mask-0> met <mask-1>.", "A": {"<mask-0>": "Bob", "<mask-1>": "Rome"}}]
    for task, asked in (("shortdep_qa", pairs), ("longdep_qa", pairs), ("shortdep_cloze", cloze)):
        # As published: what Python prints, in a text.
        rows = [{"input": f"text {i}", "title": "t", "qa_pairs": repr(asked), "output": "none"} for i in (0, 1)]
        lines(tmp_path / "data" / f"{task}.jsonl", rows)
    summary = {"input": "paper", "title": "t", "qa_pairs": "none", "output": "we show that it works"}
    lines(tmp_path / "data" / "longdep_summarization.jsonl", [summary])
    made = source(tmp_path, use="loogle", path="data")
    problems = made.problems(100, 0)
    assert len(problems) == 6 + 6 + 2 + 1
    assert len({p.index for p in problems}) == 15
    assert [p.task for p in problems[:4]] == list(made.known)
    short = [p for p in problems if p.task == "shortdep_qa"]
    assert len({p.prompt.partition("text ")[2][0] for p in short[:2]}) == 2  # the first question of each text first
    assert grade(short[0], "It is in the old town")["score"] == 1.0  # recall
    assert grade(short[0], "")["score"] == 0.0
    filled = next(p for p in problems if p.task == "shortdep_cloze")
    assert grade(filled, "Sure: {'<mask-0>': 'Bob', '<mask-1>': 'Paris'}") == {"score": 0.5, "exact": 0.0}
    assert grade(filled, "{'<mask-0>': __import__('os')}")["score"] == 0.0
    assert "{'<mask-0>': 'Bob', '<mask-1>': 'Gorrosion Magazine'" in filled.prompt


@pytest.mark.parametrize(
    ("fields", "rows", "message"),
    [
        (
            {"use": "gpqa-diamond"},
            [{"question": "?", "answer": "A"}],
            r"no fields 'Question', 'Correct Answer', .*, which gpqa-diamond has as it is published; its fields are",
        ),
        (
            {"use": "longbench-v2"},
            [{"context": "", "question": ""}],
            r"no fields 'choice_A', .*, which longbench-v2 has",
        ),
        ({"use": "aime-2026"}, [{"question": "?", "answer": 1}], r"has no field 'problem' for `question`"),
        (
            {"use": "longbench", "tasks": ["trec"]},
            [{"context": "", "question": "", "answers": ["x"]}],
            r":1 has no fields 'input', 'all_classes', which longbench, trec, has as it is published; its fields are",
        ),
        (
            {"use": "longbench", "tasks": ["trec"]},
            [{"context": "", "input": "", "answers": "x", "all_classes": None}],
            r":1: `answers` should be a list of texts, as longbench has it\.$",
        ),
        ({"use": "longbench", "tasks": ["trec"]}, [[1, 2]], r"row 1 is no object with fields"),
        ({"use": "longbench"}, [{}], r"is one file, and 21 tasks of longbench are asked for"),
        (
            {"use": "infinitebench", "tasks": ["code_run"]},
            [{"context": "", "input": "?", "answer": [1], "options": []}],
            r":1: `input` calls no function such as func_1\(2\)",
        ),
        (
            {"use": "infinitebench", "tasks": ["code_debug"]},
            [{"context": "", "input": "?", "answer": ["x"], "options": ["a", "b", "c", "d"]}],
            r":1: its `answer` is not among its `options`",
        ),
        (
            {"use": "loogle", "tasks": ["longdep_qa"]},
            [{"input": "", "qa_pairs": "[{'Q': 1", "output": ""}],
            r":1: `qa_pairs` should be a list of questions `Q` and answers `A`",
        ),
    ],
)
def test_another_format_is_said_in_one_sentence(tmp_path, fields, rows, message):
    lines(tmp_path / "x.jsonl", rows)
    with pytest.raises(KVPolicyError, match=message) as caught:
        source(tmp_path, path="x.jsonl", **fields).problems(4, 0)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("datasets: ")


@pytest.mark.parametrize("use", ["longbench", "infinitebench", "loogle"])
@pytest.mark.parametrize("text", ["{broken", "", "[1", '"text"'])
def test_files_that_are_not_json_are_refused(tmp_path, use, text):
    made = source(use=use, tasks=[BENCHMARKS[use].known[0]], path=str(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(KVPolicyError, match=r"^datasets: .*x\.jsonl"):
        made.problems(4, 0)


def test_a_folder_without_a_task_is_refused(tmp_path):
    with pytest.raises(KVPolicyError, match=r"has no file narrativeqa.jsonl; write `tasks` for those that it has"):
        source(tmp_path, use="longbench", path=".").problems(4, 0)


def test_a_gated_data_set_is_said_to_be_one(monkeypatch):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def refuse(*args, **kwargs):
        raise DatasetNotFoundError("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub. You must be authenticated")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(KVPolicyError) as caught:
        source(use="gpqa-diamond").problems(1, 0)
    assert str(caught.value) == (
        "datasets: Idavidrein/gpqa, split train is gated, and access to it has not been given; ask for it on "
        "https://huggingface.co/datasets/Idavidrein/gpqa, log in with `hf auth login`, or name a local copy as `path`."
    )


def test_tasks_that_are_not_known_are_refused():
    with pytest.raises(FieldError, match=r"there is no task 'tric'\. Did you mean 'trec'\? Tasks: narrativeqa"):
        source(use="longbench", tasks=["tric"])


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(FieldError) as caught:
        source(use="longbenh")
    for name in BENCHMARKS:
        assert name in str(caught.value)
    assert "Did you mean 'longbench'?" in str(caught.value)
    assert str(caught.value).endswith(
        "Anything else on the hub: {use: hub, id: OWNER/NAME, split: test, question: FIELD, answer: FIELD}."
    )


def test_the_longest_answer_is_known(tmp_path):
    assert BENCHMARKS["longbench"].longest == max(map(longest_answer, PROMPTS))
    assert BENCHMARKS["infinitebench"].longest == max(task.most_tokens for task in TASKS.values())
    assert {name for name, kind in BENCHMARKS.items() if kind.longest} == {
        *("ruler", "longbench", "longbench-v2", "infinitebench", "loogle"),
    }


def test_every_grader_is_named_once():
    assert all(named(f"{name}-of-first-line") is GRADERS[name] for name in GRADERS)


def test_of_a_line_that_is_too_long_no_more_is_read_than_is_needed_to_say_so(monkeypatch):
    monkeypatch.setattr(json_rows, "_LONGEST_LINE", 100)
    file = io.BytesIO(b'{"a": 1}\n' + b"x" * 100_000)
    close, seen = file.close, []
    file.close = lambda: seen.append(file.tell()) or close()
    with pytest.raises(KVPolicyError, match=r"datasets: f:2 is longer than any published row; name a file of JSON"):
        json_rows.JsonRows(file, "f")
    assert seen[0] < 1_000
