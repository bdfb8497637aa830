"""LongBench (arXiv 2308.14508): 21 tasks, with the prompts, lengths of answers and metrics of its repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from kvpolicy.errors import KVPolicyError
from kvpolicy.study.benchmarks.prompts import cut_middle, filled
from kvpolicy.study.benchmarks.tasked import TaskedSource
from kvpolicy.study.grading import FIRST_LINE
from kvpolicy.study.problem import Problem
from kvpolicy.study.source import TextMeasure

_STORY: Final = (
    "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
    "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: {context}\n\n"
    "Now, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do not "
    "provide any explanation.\n\nQuestion: {input}\n\nAnswer:"
)
_UNANSWERABLE: Final = (
    "Answer the question{0} as concisely as you can, using a single phrase or sentence if possible. If the question "
    'cannot be answered based on the information in the article, write "unanswerable". If the question is a yes/no '
    'question, answer "yes", "no", or "unanswerable". Do not provide any explanation.\n\n'
)
_ARTICLE: Final = (
    "You are given a scientific article and a question. "
    + _UNANSWERABLE.format("")
    + "Article: {context}\n\n "
    + _UNANSWERABLE.format(" based on the above article")
    + "Question: {input}\n\nAnswer:"
)
_PASSAGES: Final = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the "
    "answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
)
_CODE: Final = "Please complete the code given below. \n{context}%sNext line of code:\n"

PROMPTS: Final[Mapping[str, str]] = {
    "narrativeqa": _STORY,
    "qasper": _ARTICLE,
    "multifieldqa_en": (
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
    ),
    "multifieldqa_zh": (
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。"
        "\n\n问题：{input}\n回答："
    ),
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "dureader": (
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答："
    ),
    "gov_report": (
        "You are given a report by a government agency. Write a one-page summary of the "
        "report.\n\nReport:\n{context}\n\n"
        "Now, write a one-page summary of the report.\n\nSummary:"
    ),
    "qmsum": (
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or "
        "more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in "
        "one or "
        "more sentences.\n\nQuery: {input}\nAnswer:"
    ),
    "multi_news": (
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, "
        "write a "
        "one-page summary of all the news.\n\nSummary:"
    ),
    "vcsum": "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
    "trec": (
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}"
    ),
    "triviaqa": (
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The "
        "following are some examples.\n\n{context}\n\n{input}"
    ),
    "samsum": (
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}"
    ),
    "lsht": "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
    "passage_count": (
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, "
        "how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique "
        "paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, 3, and "
        "so "
        "on.\n\nThe final answer is: "
    ),
    "passage_retrieval_en": (
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is "
        "from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph "
        "that the "
        'abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: '
    ),
    "passage_retrieval_zh": (
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n{input}\n\n"
        '请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：'
    ),
    "lcc": _CODE % "",
    "repobench-p": _CODE % "{input}",
}
"""``config/dataset2prompt.json`` of its repository, with the misprints that are there."""

_SHORT: Final = frozenset(("hotpotqa", "2wikimqa", "musique", "triviaqa"))
_SUMMARIES: Final = frozenset(("gov_report", "qmsum", "multi_news", "vcsum"))
_OF_128: Final = frozenset(("narrativeqa", "qasper", "dureader", "samsum"))

PLAIN: Final = frozenset(("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))
"""Tasks for which its authors apply no chat template."""

GRADERS: Final[Mapping[str, str]] = {
    "multifieldqa_zh": "f1-chinese",
    "dureader": "rouge-l-chinese",
    "gov_report": "rouge-l",
    "qmsum": "rouge-l",
    "multi_news": "rouge-l",
    "vcsum": "rouge-l-chinese",
    "trec": f"class{FIRST_LINE}",
    "triviaqa": f"f1{FIRST_LINE}",
    "samsum": f"rouge-l{FIRST_LINE}",
    "lsht": f"class{FIRST_LINE}",
    "passage_count": "count",
    "passage_retrieval_en": "paragraph",
    "passage_retrieval_zh": "paragraph",
    "lcc": "code-line",
    "repobench-p": "code-line",
}
"""Metric by task; F1 of words for the others."""


def longest_answer(task: str) -> int:
    """Return the most tokens of an answer, as ``config/dataset2maxlen.json`` has them."""
    if task in _SUMMARIES:
        return 512
    if task in _OF_128:
        return 128
    return 32 if task in _SHORT or task.startswith("passage_") else 64


class LongBenchSource(TaskedSource):
    """LongBench; of a text that does not fit the model the middle is left out."""

    use: ClassVar[str] = "longbench"
    size: ClassVar[int | None] = 4750
    longest: ClassVar[int | None] = 512
    known: ClassVar[Sequence[str]] = tuple(PROMPTS)
    columns: ClassVar[Sequence[str]] = ("input", "context", "answers", "all_classes")
    archive: ClassVar[str | None] = "data.zip"

    id: str = "THUDM/LongBench"

    def _problem(
        self, task: str, fields: Mapping[str, Any], part: int, where: str, measure: TextMeasure | None
    ) -> Problem:
        answers, classes = fields["answers"], fields["all_classes"] or ()
        if not isinstance(answers, list) or not answers or not all(isinstance(each, str) for each in answers):
            raise KVPolicyError(f"datasets: {where}: `answers` should be a list of texts, as {self.use} has it.")
        chat = False if self.chat is None and task in PLAIN else self.chat
        prompt, question_at = filled(PROMPTS[task], {"context": str(fields["context"]), "input": str(fields["input"])})
        most = longest_answer(task)
        prompt, question_at = cut_middle(
            prompt, question_at, measure, self.truncate, self.max_new_tokens or most, chat=chat
        )
        return Problem(
            *("", 0, prompt, answers[0], GRADERS.get(task, "f1")),
            chat=chat,
            answers=tuple(answers),
            classes=tuple(map(str, classes)),
            most_tokens=most,
            question_at=question_at,
        )
