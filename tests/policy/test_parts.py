"""What is no part of a policy is refused in a sentence, not by the first line that stumbles over it."""

from __future__ import annotations

from dataclasses import fields

import pytest

import kvpolicy
from kvpolicy import Policy, SpecError


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "budget",
            256,
            "budget: 256 is no Budget; give an instance of one, or write names and numbers in a PolicySpec",
        ),
        ("importance", "h2o", "importance: 'h2o' is no ImportanceScorer; give"),
        ("trigger", None, "trigger: None is no Trigger; give"),
        ("redundancy", "importance", "redundancy: WindowAttention.* is no RedundancyScorer; give"),
        ("protections", {"sinks": 4}, "protections: {'sinks': 4} is no tuple of Protection; give"),
        ("post", ("rerotate",), r"post: \('rerotate',\) is no tuple of PostOperation; give"),
        ("phase", "always", "phase: 'always' is none; write one of prefill, decode, both."),
    ],
)
def test_what_is_no_part_is_refused(name, given, message):
    policy = kvpolicy.load("rkv").build()
    parts = {field.name: getattr(policy, field.name) for field in fields(Policy)}
    assert Policy(**parts) == policy
    given = parts["importance"] if given == "importance" else given
    with pytest.raises(SpecError, match=f"^{message}"):
        Policy(**{**parts, name: given})


def test_all_that_is_no_part_is_said():
    policy = kvpolicy.load("rkv").build()
    parts = {field.name: getattr(policy, field.name) for field in fields(Policy)}
    with pytest.raises(SpecError) as caught:
        Policy(**{**parts, "budget": 3, "mixer": "linear"})
    assert [sentence.partition(":")[0] for sentence in caught.value.problems] == ["budget", "mixer"]
