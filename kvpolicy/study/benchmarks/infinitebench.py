"""InfiniteBench (arXiv 2402.13718): twelve tasks, with the prompts that its repository has for open models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from kvpolicy.errors import KVPolicyError
from kvpolicy.study.benchmarks.prompts import cut_middle, filled
from kvpolicy.study.benchmarks.tasked import TaskedSource
from kvpolicy.study.problem import Problem
from kvpolicy.study.source import TextMeasure


@dataclass(frozen=True)
class TaskForm:
    """How a task is asked and graded.

    Attributes:
        prompt: ``yarn_mistral_templates`` of its repository.
        most_tokens: most tokens of an answer.
        grader: how it is graded.
    """

    prompt: str
    most_tokens: int
    grader: str


_OPTIONS: Final = "A. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}\n\n"

TASKS: Final[Mapping[str, TaskForm]] = {
    "passkey": TaskForm(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about "
        "the important information.\n\n{context}\n\n{input}\n\nThe pass key is",
        *(6, "first-integer"),
    ),
    "number_string": TaskForm(
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about the "
        "important "
        "information there.\n\n{context}\n\n{input}\n\nThe sequence of digits is",
        *(12, "first-integer"),
    ),
    "kv_retrieval": TaskForm(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{input}",
        *(50, "a-word"),
    ),
    "longdialogue_qa_eng": TaskForm(
        'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", and '
        "you should try to guess who that character is.\n\n{context}\n\n"
        "The name that has been replaced with $$MASK$$ is likely",
        *(40, "speaker"),
    ),
    "longbook_sum_eng": TaskForm("Summarize the book below.\n\n{context}\n\nSummary:", 1200, "rouge-lsum"),
    "longbook_choice_eng": TaskForm(
        "Read the book and answer the question.\n\n{context}\n\nQuestion: {input}\n"
        f"{_OPTIONS}The letter of the correct answer is",
        *(40, "book-option"),
    ),
    "longbook_qa_eng": TaskForm(
        "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\nQuestion: "
        "{input}\nAnswer:",
        *(40, "f1"),
    ),
    "longbook_qa_chn": TaskForm(
        "阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}\n答案：", *(40, "f1-characters")
    ),
    "math_find": TaskForm("{prefix}\n\n{context}\n\n{input}", 3, "first-number"),
    "math_calc": TaskForm(
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {context}\nValues:",
        *(30000, "leading-values"),
    ),
    "code_run": TaskForm(
        "There is a function called {func} in the following Python code.\n\n{context}\n\nPlease compute the exact "
        "value of "
        "{func_call}. The value of {func_call} is",
        *(5, "last-integer"),
    ),
    "code_debug": TaskForm(
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        "crash."
        f"\n\n{{context}}\n\nOptions:\n{_OPTIONS}The correct option is:",
        *(5, "function-option"),
    ),
}
"""Tasks by the names of their files."""

_CHOICES: Final = ("code_debug", "longbook_choice_eng")


class InfiniteBenchSource(TaskedSource):
    """InfiniteBench, without a chat template as its authors ask open models; too long a text loses its middle."""

    use: ClassVar[str] = "infinitebench"
    size: ClassVar[int | None] = 3932
    longest: ClassVar[int | None] = 30000
    known: ClassVar[Sequence[str]] = tuple(TASKS)
    columns: ClassVar[Sequence[str]] = ("input", "context", "answer", "options")

    id: str = "xinrongzhang2022/InfiniteBench"

    def _problem(
        self, task: str, fields: Mapping[str, Any], part: int, where: str, measure: TextMeasure | None
    ) -> Problem:
        known = TASKS[task]
        values = {"context": str(fields["context"]), "input": str(fields["input"])} | _places(task, fields, where)
        prompt, question_at = filled(known.prompt, values)
        chat = bool(self.chat)
        most = self.max_new_tokens or known.most_tokens
        prompt, question_at = cut_middle(prompt, question_at, measure, self.truncate, most, chat=chat)
        answers = _answers(task, fields, where)
        return Problem(
            *("", 0, prompt, answers[0], known.grader),
            chat=None if self.chat else False,
            answers=answers,
            most_tokens=known.most_tokens,
            question_at=question_at,
        )


def _places(task: str, fields: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return what stands in the places of a prompt that only some tasks have; raises KVPolicyError."""
    question = str(fields["input"])
    if task == "code_run":
        call = re.search(r"func_[0-9]+\(-?[0-9]+\)", question)
        if call is None:
            raise KVPolicyError(f"datasets: {where}: `input` calls no function such as func_1(2), as code_run has it.")
        return {"func_call": call[0], "func": call[0].partition("(")[0]}
    if task == "math_find":
        asked = re.search(r"The .+ of", question)
        if asked is None:
            raise KVPolicyError(f"datasets: {where}: `input` says not which number is asked for, as math_find has it.")
        return {"prefix": f"What is {asked[0].lower()[:-3]} in the following list?"}
    if task in _CHOICES:
        return {f"OPTION_{letter}": option for letter, option in zip("ABCD", _options(fields, where), strict=True)}
    return {}


def _options(fields: Mapping[str, Any], where: str) -> list[str]:
    options = fields["options"]
    if not isinstance(options, list) or len(options) != 4:
        raise KVPolicyError(f"datasets: {where}: `options` should be a list of four, as infinitebench has it.")
    return list(map(str, options))


def _answers(task: str, fields: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return what a grader needs: all answers, or an option and its letter; raises KVPolicyError."""
    answer = fields["answer"]
    given = [str(each) for each in (answer if isinstance(answer, list) else [answer])]
    if task == "math_calc" and given and isinstance(answer, list) and isinstance(answer[0], list):
        given = [str(each) for each in answer[0]]
    if not given or (task == "math_calc" and not all(re.fullmatch(r"-?\d+", each) for each in given)):
        raise KVPolicyError(f"datasets: {where}: `answer` holds no answer of the kind that {task} has.")
    if task in _CHOICES:
        options = _options(fields, where)
        if given[0] not in options:
            raise KVPolicyError(f"datasets: {where}: its `answer` is not among its `options`.")
        return given[0], "ABCD"[options.index(given[0])]
    return tuple(given)
