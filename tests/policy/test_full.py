"""A policy that ranks nothing takes no budget: the oldest entries are nobody's choice."""

from __future__ import annotations

import json

import pytest

import kvpolicy
from kvpolicy import SpecError
from kvpolicy.cli import main

WORDS = "budget: policy 'full' ranks nothing and protects nothing, so that a budget would keep the oldest"


@pytest.mark.parametrize("budget", [32, 0.5, {"tokens": 7}, {"fraction": 0.99}])
def test_the_full_cache_takes_no_budget(budget):
    full = kvpolicy.load("full")
    with pytest.raises(SpecError, match=WORDS):
        kvpolicy.load("full", budget=budget)
    with pytest.raises(SpecError, match=WORDS):
        full.replace("budget", budget)
    words = json.dumps(budget)
    with pytest.raises(SpecError, match="3:1: budget: policy 'mine' ranks nothing"):
        kvpolicy.PolicySpec.from_yaml(f"schema_version: 1\npolicy: mine\nbudget: {words}\nextends: full\n")
    assert kvpolicy.load("full", budget=1.0) == full


def test_what_ranks_or_protects_takes_one():
    assert kvpolicy.load("full", budget=32, importance="recency").build().ranks
    assert not kvpolicy.load("full", budget=32, protect={"recent": 32}).build().ranks
    mixed = {"importance": "none", "redundancy": "none", "mixer": {"use": "linear", "weight": 0.5}}
    with pytest.raises(SpecError, match="ranks nothing"):
        kvpolicy.load("rkv").replace({**mixed, "protect": {"sinks": False, "recent": False}})
    for name in [entry.name for entry in kvpolicy.catalog().policies()]:
        policy = kvpolicy.load(name).build()
        assert policy.ranks == (name != "full")


def test_explain_promises_nothing(capsys):
    assert main(["explain", "full", "--budget", "128"]) != 0
    out = capsys.readouterr()
    assert "ranks nothing" in out.out + out.err
    assert "saved" not in out.out
