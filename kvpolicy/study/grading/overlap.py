"""Graders that measure what an output and a right answer have in common: F1, ROUGE, similarity of code."""

from __future__ import annotations

import difflib
import re
import string
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from kvpolicy.study.extra import library
from kvpolicy.study.problem import Problem

_EXTRA: Final = "kvpolicy[benchmarks]"
_FRAMES: Final = 2_000  # of our own, below what ROUGE's recursion takes

_CHINESE_MARKS: Final = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、"
    "〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_MARKS: Final = frozenset(string.punctuation)
_ALL_MARKS: Final = _MARKS | frozenset(_CHINESE_MARKS)


def f1(problem: Problem, output: str) -> dict[str, float]:
    """Return the best F1 of words, without case, punctuation and articles (SQuAD's; LongBench, InfiniteBench)."""
    given = _words(output)
    return _best(problem, lambda answer: _f1(given, _words(answer)))


def f1_chinese(problem: Problem, output: str) -> dict[str, float]:
    """Return the best F1 of the words that jieba finds, without case and punctuation (LongBench, Chinese)."""
    given = _chinese_words(output)
    return _best(problem, lambda answer: _f1(given, _chinese_words(answer)))


def f1_characters(problem: Problem, output: str) -> dict[str, float]:
    """Return the best F1 of characters, without case and punctuation (InfiniteBench, longbook_qa_chn)."""
    given = _bare(output)
    return _best(problem, lambda answer: _f1(given, _bare(answer)))


def rouge_l(problem: Problem, output: str) -> dict[str, float]:
    """Return the best F measure of ROUGE-L, of the package rouge (LongBench)."""
    return _best(problem, lambda answer: _rouge(output, answer, "f"))


def rouge_l_recall(problem: Problem, output: str) -> dict[str, float]:
    """Return the recall of ROUGE-L, of the package rouge; an empty output is the word None (LooGLE)."""
    return _best(problem, lambda answer: _rouge(output or "None", answer, "r"))


def rouge_l_chinese(problem: Problem, output: str) -> dict[str, float]:
    """Return the best F measure of ROUGE-L over the words that jieba finds (LongBench, Chinese)."""
    given = " ".join(_cut(output))
    return _best(problem, lambda answer: _rouge(given, " ".join(_cut(answer)), "f"))


def rouge_lsum(problem: Problem, output: str) -> dict[str, float]:
    """Return the best F measure of ROUGE-Lsum, of the package rouge-score (InfiniteBench, longbook_sum_eng)."""
    module: Any = library("rouge_score.rouge_scorer", "grade: rouge-lsum needs", package=_EXTRA)
    scorer = module.RougeScorer(["rougeLsum"])
    return _best(problem, lambda answer: float(scorer.score(answer, output)["rougeLsum"].fmeasure))


def code_line(problem: Problem, output: str) -> dict[str, float]:
    """Return how alike the first line that is no comment and the right one are, in percent (LongBench, code).

    It is the ratio of difflib, rounded to a percent: what fuzzywuzzy gives with the packages that LongBench names.
    """
    lines = output.lstrip("\n").split("\n")
    given = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return _best(problem, lambda answer: round(100 * difflib.SequenceMatcher(None, given, answer).ratio()) / 100)


def _best(problem: Problem, score: Callable[[str], float]) -> dict[str, float]:
    return {"score": max(score(answer) for answer in problem.answers)}


def _f1(given: Sequence[str], right: Sequence[str]) -> float:
    common = (Counter(given) & Counter(right)).total()
    return 2 * common / (len(given) + len(right)) if common else 0.0


def _words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in _MARKS)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _bare(text: str) -> str:
    return "".join("".join(character for character in text.lower() if character not in _ALL_MARKS).split())


def _chinese_words(text: str) -> list[str]:
    return [bare for word in _cut(text) if (bare := _bare(word))]


def _cut(text: str) -> list[str]:
    with warnings.catch_warnings():  # of an old package's escapes, when it is read for the first time
        warnings.simplefilter("ignore")
        jieba: Any = library("jieba", "grade: Chinese words need", package=_EXTRA)
        jieba.setLogLevel(60)
        return list(jieba.cut(text, cut_all=False))


def _rouge(output: str, answer: str, part: str) -> float:
    module: Any = library("rouge", "grade: rouge-l needs", package=_EXTRA)
    if not output.replace(".", " ").split() or not answer.replace(".", " ").split():  # for which it raises
        return 0.0
    with _room_for(len(output.split()) + len(answer.split())):
        scores = module.Rouge(metrics=["rouge-l"]).get_scores([output], [answer], avg=True)
    return float(scores["rouge-l"][part])


@contextmanager
def _room_for(words: int) -> Iterator[None]:
    """Let the package recur as deep as two texts are long; at Python's own limit the authors' code would give 0."""
    known = sys.getrecursionlimit()
    sys.setrecursionlimit(max(known, words + _FRAMES))
    try:
        yield
    finally:
        sys.setrecursionlimit(known)
