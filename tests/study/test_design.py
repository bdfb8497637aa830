from __future__ import annotations

import pytest

import kvpolicy
from kvpolicy import SpecError
from kvpolicy.study.design import Axis, TraceBudget, expand
from kvpolicy.study.models import ModelRef
from kvpolicy.study.runs import Plan, digest_of, has_seed, with_seed
from kvpolicy.study.sources import NeedleSource
from kvpolicy.study.spec import StudySpec

RKV = kvpolicy.load("rkv", 256)
WEIGHTS = Axis("mixer.weight", (0.1, 0.3, 0.5))
WINDOWS = Axis("importance.observe", (8, 16, 32))


def names(*args, **kwargs):
    return [variant.label for variant in expand(*args, **kwargs)]


def test_grid_takes_all_combinations():
    found = expand(RKV, (WEIGHTS, WINDOWS), (), "grid")
    assert len(found) == 9
    assert found[5].policy == RKV.replace({"mixer.weight": 0.3, "importance.observe": 32})
    assert found[5].name == "mixer.weight=0.3, importance.observe=32"


def test_one_at_a_time_takes_the_base_and_each_other_value():
    found = expand(RKV, (WEIGHTS, WINDOWS), (), "one-at-a-time")
    assert [v.name for v in found] == [
        "rkv", "mixer.weight=0.3", "mixer.weight=0.5", "importance.observe=16", "importance.observe=32",
    ]  # fmt: skip
    assert found[0].policy == RKV
    assert found[3].policy == RKV.replace("importance.observe", 16)


def test_paired_takes_first_with_first():
    found = expand(RKV, (WEIGHTS, WINDOWS), (), "paired")
    assert [v.policy for v in found] == [
        RKV.replace({"mixer.weight": w, "importance.observe": o}) for w, o in ((0.1, 8), (0.3, 16), (0.5, 32))
    ]
    with pytest.raises(
        SpecError,
        match=r"design: paired axes need as many values each, but mixer.weight has 3, importance.observe has 1",
    ):
        StudySpec(
            study="s", base="rkv", design="paired", models=["m"], datasets=["gsm8k"],
            axes={"mixer.weight": [0.1, 0.3, 0.5], "importance.observe": [8]},
        )  # fmt: skip


def test_conditions_cross_every_design_and_an_axis_of_one_value_is_not_named():
    conditions = (Axis("budget", (128, TraceBudget(0.1)), "conditions"), Axis("trigger.interval", (32,), "conditions"))
    found = expand(RKV, (WEIGHTS,), conditions, "one-at-a-time")
    assert [v.condition for v in found] == ["budget=128"] * 3 + ["budget=10% of the trace"] * 3
    assert {v.policy.trigger.component.interval for v in found} == {32}
    assert [v.name for v in found[:3]] == ["rkv", "mixer.weight=0.3", "mixer.weight=0.5"]


def test_whole_policies_and_excluded_combinations():
    policies = Axis("policy", (RKV, kvpolicy.load("snapkv")))
    pins = Axis("protect.prompt", (False, True), "conditions")
    assert names(None, (policies,), (pins,), "grid", exclude=[{"policy": "snapkv", "protect.prompt": True}]) == [
        "rkv | protect.prompt=false", "snapkv | protect.prompt=false", "rkv | protect.prompt=true",
    ]  # fmt: skip


def test_the_full_cache_is_no_variant_whatever_the_budget():
    policies = Axis("policy", (RKV, kvpolicy.load("full")))
    for budgets in ((64, 128), (TraceBudget(0.1), TraceBudget(0.2))):
        for condition in ((Axis("budget", budgets, "conditions"),), (Axis("protect.prompt", (False, True)),)):
            found = expand(None, (policies,), condition, "grid")
            assert [v.name for v in found] == ["rkv", "rkv"]
    assert [v.name for v in expand(None, (policies,), (), "grid")] == ["rkv"]
    scored = expand(kvpolicy.load("full"), (Axis("importance", ("recency",)), Axis("budget", (64,))), (), "grid")
    assert [v.policy.budget.tokens for v in scored] == [64]
    with pytest.raises(Exception, match="name nothing but the full cache, which every study measures"):
        expand(None, (Axis("policy", (kvpolicy.load("full"),)),), (Axis("budget", (64,)),), "grid")


def test_variants_may_be_compared_with_the_full_cache():
    parts = {"models": ["m"], "datasets": ["gsm8k"], "conditions": {"budget": [64, 128]}}
    study = StudySpec(study="s", axes={"policy": ["rkv", "full"]}, compare_to="full", **parts)
    assert [v.label for v in study.variants()] == ["rkv | budget=64", "rkv | budget=128"]


def test_the_same_policy_twice_is_refused():
    twin = RKV.replace("policy", "twin")
    with pytest.raises(Exception, match="'twin' and 'rkv' are the same policy; remove one"):
        expand(None, (Axis("policy", (RKV, twin)),), (), "grid")
    other = RKV.replace("mixer.weight", 0.7)
    with pytest.raises(Exception, match="two different variants are called 'rkv'"):
        expand(None, (Axis("policy", (RKV, other)),), (), "grid")


def test_what_only_fails_together_is_said_to():
    axes = (Axis("budget", (32, 64)), Axis("protect.recent", (8, 40)))
    with pytest.raises(
        Exception, match=r"budget=32, protect\.recent=40 cannot be combined: budget: 32 entries are fewer than the 44"
    ):
        expand(RKV, axes, (), "grid")
    assert len(expand(RKV, axes, (), "grid", exclude=[{"budget": 32, "protect.recent": 40}])) == 3


def test_a_share_of_the_trace_becomes_entries():
    (variant,) = expand(RKV, (Axis("budget", (TraceBudget(0.15),)),), (), "grid")
    assert variant.resolved(1017.4).budget.tokens == 153
    with pytest.raises(SpecError, match="fewer than the 12 that are protected"):
        variant.resolved(20)
    with pytest.raises(SpecError, match="the full cache has not answered"):
        variant.resolved(None)


def test_a_seed_goes_into_every_random_component():
    policy = kvpolicy.load("random", 64)
    assert has_seed(policy)
    assert not has_seed(RKV)
    assert with_seed(policy, 3).importance.component.seed == policy.importance.component.seed + 3
    assert with_seed(RKV, 3) is RKV
    assert digest_of(policy) != digest_of(with_seed(policy, 3))
    assert digest_of(RKV) == digest_of(RKV.replace({"policy": "other", "description": "Another text."}))


def test_what_looks_like_a_share_on_another_axis_is_that_axis_fault():
    with pytest.raises(SpecError, match=r"axes\.selector\.scope\.0: should be 'head', 'layer' or 'model'"):
        StudySpec(
            study="s", base="rkv", axes={"selector.scope": [{"trace": "layer"}, "head"]}, exclude=[{"budget": 64}],
            conditions={"budget": [64, 128]}, models=["reasoner"], datasets=[{"use": "needle"}],
        )  # fmt: skip


def test_a_seed_that_has_no_problem_left_gets_none_of_another_seed(monkeypatch):
    drawn = NeedleSource.problems

    def two(self, count, seed, measure=None):
        return drawn(self, count, seed) if seed < 2 else []

    monkeypatch.setattr(NeedleSource, "problems", two)
    spec = StudySpec(
        study="s", models=["m"], datasets=[{"use": "needle"}], samples=3, seeds=[0, 1, 2], base="rkv",
        axes={"budget": [64]},
    )  # fmt: skip
    plan = Plan(spec, [ModelRef("m", "m", None, "0", "float64", "cpu")])
    for runs in plan.asked(plan.cells({}), {}):
        assert sorted(run.problem.index for run in runs) == [0, 1, 2, 3, 4, 5]
        assert len({run.key for run in runs}) == 6


def test_what_is_left_out_has_to_be_an_axis():
    with pytest.raises(SpecError, match=r"exclude\.0\.budgte: is no axis or condition\. Did you mean 'budget'"):
        StudySpec(
            study="s", base="rkv", axes={"mixer.weight": [0.1, 0.3]}, exclude=[{"budgte": 64}],
            conditions={"budget": [64, 128]}, models=["reasoner"], datasets=[{"use": "needle"}],
        )  # fmt: skip
