"""A decision asks the device once, however many layers there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy.loading.installed import catalog
from kvpolicy.testing.laws.inputs import large_case
from kvpolicy.testing.tables import stand_in_tables
from kvsupport.reads import counting_reads

POLICIES = [entry.name for entry in catalog().policies()]


@pytest.mark.parametrize("name", POLICIES)
def test_a_decision_reads_once(name):
    with stand_in_tables():
        policy = kvpolicy.load(name).build()
        case = large_case(policy, slots=120)
        views = [replace(view, layer_idx=i, num_layers=5) for i in range(5) for view in case.views]
        policy.decide(views, case.budget)  # tables are read from files once
        with counting_reads() as reads:
            policy.decide(views, case.budget)
    # In plain torch similar keys are searched for block by block, until the host hears that none are left.
    assert [place for place in reads.places if not place.startswith("similarity.py")] == ["findings.py:read"]


@pytest.mark.parametrize("scope", ["head", "layer", "model"])
@pytest.mark.parametrize(
    "selector", [entry.name for entry in catalog().entries() if entry.kind == "selector" and entry.name != "top_k"]
)
def test_every_selector_takes_its_width_from_the_host(selector, scope):
    policy = kvpolicy.load("random").replace("selector", {"use": selector, "scope": scope}).build()
    case = large_case(policy, slots=120)
    with counting_reads() as reads:
        policy.decide(case.views, case.budget)
    assert reads.made == ["to"]


def test_the_counter_sees_what_waits():
    ways = {
        "item": lambda t: t.sum().item(),
        "tolist": lambda t: t.tolist(),
        "cpu": lambda t: t.cpu(),
        "to": lambda t: t.to("cpu"),
        "to a dtype": lambda t: t.to(torch.int32),
        "__bool__": lambda t: bool(t.any()),
        "__int__": lambda t: int(t.max()),
        "__float__": lambda t: float(t.max()),
        "numpy": lambda t: t.numpy(),
        "nonzero": lambda t: t.nonzero(),
        "aten::index": lambda t: t[t > 2],
        "aten::masked_select": lambda t: torch.masked_select(t, t > 2),
        "aten::nonzero": lambda t: torch.where(t > 2),
        "range": lambda t: range(t.max()),
        "once read": lambda t: t.to("cpu").tolist(),
    }
    seen = {}
    for name, way in ways.items():
        tensor = torch.arange(6)
        with counting_reads() as reads:
            way(tensor)
        seen[name] = reads.made
    assert seen.pop("to a dtype") == []
    assert seen.pop("range") == ["__index__"]
    assert seen.pop("once read") == ["to"]
    assert seen == {name: [name] for name in seen}
