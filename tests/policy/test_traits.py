"""What a policy says of itself to a runtime is what it does."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

import kvpolicy
from kvpolicy import ComponentError, Protection, SpecError, ops
from kvpolicy.contracts.components import PostOperation
from kvpolicy.loading.installed import catalog
from kvpolicy.testing.laws.inputs import large_case
from kvpolicy.testing.tables import stand_in_tables

POLICIES = [entry.name for entry in catalog().policies()]


@pytest.fixture(autouse=True)
def _tables():
    """The shipped tables are of another model."""
    with stand_in_tables():
        yield


@pytest.mark.parametrize("name", POLICIES)
def test_traits_are_what_a_policy_does(name):
    policy = kvpolicy.load(name).build()
    traits = policy.traits
    for seed in range(3):
        case = large_case(policy, slots=150, seed=seed).with_padding(5, 3)
        lengths = torch.stack(policy.decide(case.views, case.budget).lengths)
        if traits.length_is_counted:  # the padding is not among the 75 of 150
            assert (lengths == torch.tensor(case.budget)[:, None]).all()
        if traits.equal_counts:
            assert (lengths == lengths[:, :, :1]).all()
    assert traits.length_is_counted <= traits.equal_counts
    if not traits.equal_counts:
        assert policy.allocator.counts != "equal" or not policy.selector.exact
    assert traits.needs == frozenset().union(*(c.needs for c in policy.components))
    assert [each.name for each in traits.state] == [s.name for c in policy.components for s in c.slot_state()]
    assert traits.re_rotates == any(isinstance(p, PostOperation) and p.changes == "positions" for p in policy.post)
    if policy.phase != "decode":
        try:
            replace(policy, prefill_chunk=64)
        except SpecError:
            assert traits.whole_prompt
        else:
            assert not traits.whole_prompt


class DropsOdd(Protection):
    effect: ClassVar = "drop"

    def mask(self, view):
        return view.valid & (view.positions % 2 == 1)


def test_a_protection_that_drops_entries_leaves_lengths_to_the_device():
    base = kvpolicy.load("rkv", budget=90).build()
    assert base.traits.length_is_counted
    pads = catalog().get("protection", "pads")()
    assert replace(base, protections=(*base.protections, pads)).traits.length_is_counted
    dropping = replace(base, protections=(*base.protections, DropsOdd()))
    assert not dropping.traits.length_is_counted
    assert not dropping.traits.equal_counts
    case = large_case(dropping, slots=150)
    assert int(dropping.decide(case.views, [90, 90]).lengths[0].max()) == 75
    threshold = kvpolicy.load("rkv").replace("selector", "threshold").build()
    assert not threshold.traits.length_is_counted


def test_a_registered_backend_can_be_named_in_a_policy_file(monkeypatch):
    class Mine(ops.Backend):
        def load(self, op):
            return None

        def refuses(self, op, /, *args, **kwargs):
            return None

        def refuses_cache(self, keys):
            return None

    spec = kvpolicy.load("rkv")
    with pytest.raises(SpecError, match="backend: should be one of auto, torch, triton, got 'mine'"):
        spec.replace("backend", "mine")
    with pytest.raises(SpecError, match=r"backend: should be one of .* \(did you mean 'triton'\?\), got 'tritn'"):
        spec.replace("backend", "tritn")
    known = catalog().backends()
    monkeypatch.setattr("kvpolicy.ops.dispatch._all", lambda: {**known, "mine": Mine()})
    named = spec.replace("backend", "mine")
    assert kvpolicy.PolicySpec.from_yaml(named.to_yaml()) == named
    assert named.build().backend == "mine"
    assert "mine" in kvpolicy.json_schema()["properties"]["backend"]["enum"]
    case = large_case(named.build(), slots=60)
    named.build().decide(case.views, case.budget)


def test_a_component_error_is_an_error_of_kvpolicy():
    assert issubclass(kvpolicy.ScoreError, ComponentError)
    assert issubclass(ComponentError, kvpolicy.KVPolicyError)
