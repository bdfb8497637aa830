"""All that is wrong with a file is said at once, in the order of its lines."""

from __future__ import annotations

import pickle

import pytest

import kvpolicy
from kvpolicy import PolicySpec, SpecError

WRONG = """\
schema_version: 2
policy: My Policy
budget: {tokens: 0}
phase: decoding
triger: {every: 64}
protect: {sinks: -1, recents: 3}
importance:
  use: scaled
  base: {use: window_attention, observe: 0, group: x}
redundancy: key_cosinus
mixer: mixkv
post: [rerotate, rotate, 3]
backend: tritn
surprise: 1
"""


def problems_of(text, source="p.yaml"):
    with pytest.raises(SpecError) as caught:
        PolicySpec.from_yaml(text, source)
    return caught.value


def test_every_mistake_is_named_once_in_the_order_of_lines():
    error = problems_of(WRONG)
    places = [" ".join(problem.split(": ")[:2]) for problem in error.problems]
    assert places == [
        "p.yaml:1:1 schema_version",
        "p.yaml:2:1 policy",
        "p.yaml:3:10 budget.tokens",
        "p.yaml:4:1 phase",
        "p.yaml:5:1 triger",
        "p.yaml:6:11 protect.sinks.count",
        "p.yaml:6:22 protect.recents",
        "p.yaml:7:1 importance",
        "p.yaml:10:1 redundancy",
        "p.yaml:11:1 mixer",
        "p.yaml:12:18 post.1",
        "p.yaml:12:26 post.2",
        "p.yaml:13:1 backend",
        "p.yaml:14:1 surprise",
    ]
    assert str(error) == f"{error.problems[0]} (13 more problems after this one.)"


def test_all_problems_of_a_component_and_of_those_that_it_holds_are_named():
    head = "schema_version: 1\npolicy: p\nbudget: 64\ntrigger: {every: 16}\nimportance:\n  use: value_weighted\n"
    text = head + "  norm: 3\n  base: {use: window_attention, observe: 0, group: x}\n"
    assert [problem.split(": ")[1] for problem in problems_of(text).problems] == [
        "importance.norm",
        "importance.base.observe",
        "importance.base.group",
    ]


def test_what_follows_from_a_mistake_is_no_mistake_of_its_own():
    text = "schema_version: 1\npolicy: p\nbudgets: 64\ntrigger: 64\nimportanc: key_norm\nredundancy: kye_cosine\n"
    named = [problem.split(": ")[1] for problem in problems_of(text).problems]
    assert named == ["budgets", "trigger", "importanc", "redundancy"]


def test_a_variant_names_its_own_mistakes_and_a_base_that_is_not_there(tmp_path):
    head = "schema_version: 1\npolicy: p\n"
    assert len(problems_of(f"{head}extends: rkv\nmixer: {{weight: 2}}\nphase: x\n").problems) == 2
    assert len(problems_of(f"{head}extends: rkvv\nmixer: 3\nphase:\n").problems) == 3


def test_changes_in_python_are_checked_all_at_once():
    with pytest.raises(SpecError) as caught:
        kvpolicy.load("rkv", mixer__weight=3, importance__observe=0, phase="x")
    assert len(caught.value.problems) == 3
    with pytest.raises(SpecError, match=r"compression_ratio.*for 0.5 write `budget: \{fraction: 0.5\}`"):
        kvpolicy.load("rkv", compression_ratio=0.5)


def test_an_error_goes_whole_to_another_process():
    error = problems_of(WRONG)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.problems) == (str(error), error.problems)
