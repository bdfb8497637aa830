"""Every bundled policy file loads, round-trips, explains itself and selects exactly its budget."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
import torch

import kvpolicy
from kvpolicy.contracts.view import CacheView, Rope
from kvpolicy.testing.tables import stand_in_tables

NAMES = [
    "adakv-snapkv", "adaptive-rkv", "beaconkv", "cam", "caote", "capkv", "chunkkv", "compactor", "criticalkv", "cur",
    "dbtrim-kv", "defensivekv", "delayed-snapkv", "duo-attention", "expected-attention", "facility-location",
    "fast-caote", "finch", "full", "g-kv", "h2o", "headkv", "keydiff", "knorm", "kvcrush", "kvzap", "lagkv",
    "lazy-eviction", "lu-kv", "mixkv", "nacl", "obcache", "pyramidkv", "qfilter", "raas", "random", "random-pinned",
    "recent-pinned", "rkv", "rkv-code", "rkv-density", "rkv-head-adaptive", "rkv-paper", "rkv-pinned", "rkv-pyramid",
    "rkv-regions", "scissorhands", "sinks-recent", "snapkv", "snapkv-prefill", "streaming-llm", "think", "threshold",
    "tova", "triattention", "trim-kv", "vase", "vatp",
]  # fmt: skip
CONTROLS = {"full", "random", "random-pinned", "recent-pinned"}


def test_names():
    entries = {
        entry.name: entry for entry in kvpolicy.catalog().policies() if entry.origin.plugin == "builtin-policies"
    }
    assert sorted(entries) == NAMES
    folder = files("kvpolicy_registry") / "policies"
    assert {p.name for p in folder.iterdir() if p.name.endswith(".yaml")} == {f"{name}.yaml" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_loads_and_round_trips(name):
    spec = kvpolicy.load(name)
    assert spec.policy == name
    assert kvpolicy.PolicySpec.from_yaml(spec.to_yaml()) == spec
    assert spec.build().name == name


@pytest.mark.parametrize("name", NAMES)
def test_explains_itself(name):
    spec = kvpolicy.load(name)
    assert spec.description.endswith(".")
    assert (spec.paper == "") == (name in CONTROLS)
    assert spec.paper == "" or re.fullmatch(r"arXiv:\d{4}\.\d{5}|.+, ICML 2024", spec.paper)
    assert spec.departures or name == "full"
    assert all(text.endswith(".") for text in spec.departures)


def draw(policy, budget=(40, 40)):
    """A view of two rows, of 90 and 77 tokens, with everything that the components may ask for."""
    n, H, G, D = 90, 2, 2, 16
    generator = torch.Generator().manual_seed(n)
    positions = torch.arange(n, dtype=torch.int32)
    return CacheView(
        keys=torch.randn(2, H, n, D, generator=generator),
        values=torch.randn(2, H, n, D, generator=generator),
        positions=positions.expand(2, H, n),
        valid=positions < torch.tensor([n, n - 13])[:, None, None].expand(2, H, 1),
        scale=D**-0.5,
        layer_idx=0,
        num_layers=1,
        prompt_length=torch.tensor([20, 11]),
        seen=torch.tensor([n, n - 13]),
        compaction=torch.zeros(2, dtype=torch.int64),
        queries=torch.randn(2, H, G, 32, D, generator=generator),
        query_positions=torch.stack([positions[-32:], positions[-32:] - 13]),
        query_valid=torch.ones(2, 32, dtype=torch.bool),
        state={s.name: (20 * torch.rand(2, H, n, generator=generator)).to(s.dtype) for s in policy.slot_states},
        extras={
            "output_projection": torch.randn(H, G, D, 24, generator=generator),
            "query_mean": torch.randn(2, H, G, D, generator=generator),
            "query_covariance": torch.eye(D).expand(2, H, G, D, D),
        },
        budget=torch.tensor(budget),
        rope=Rope(1.0 / 10000 ** (torch.arange(0, D, 2).float() / D)),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [64, 70, 200])
def test_selects_exactly_the_budget(name, budget):
    spec = kvpolicy.load(name)
    if spec.build().reserved() > budget:
        spec = spec.replace("protect.recent", budget // 2)
    if spec.build().reserved() > budget:
        spec = spec.replace("protect.large_values.count", budget // 4)
    policy = (spec if name == "full" else spec.replace("budget.tokens", budget)).build()
    asked = [policy.entries(90, 20), policy.entries(77, 11)]
    view = draw(policy, asked)
    with stand_in_tables():  # the shipped ones are of another model
        (kept,) = policy.select([view], asked)
    held = [90, 77]
    wanted = [min(a, h) for a, h in zip(asked, held, strict=True)]
    if policy.counts == "equal":
        assert kept.lengths.tolist() == [[count] * 2 for count in wanted]
    elif policy.selector.exact:
        assert kept.lengths.sum(1).tolist() == [2 * count for count in wanted]
    else:
        assert all(total <= 2 * count for total, count in zip(kept.lengths.sum(1).tolist(), wanted, strict=True))
    for b in range(2):
        for h in range(2):
            slots = kept.indices[b, h, : kept.lengths[b, h]]
            assert (slots.diff() > 0).all()
            assert view.valid[b, h, slots].all()
            protected, _ = policy.masks(view)
            assert set(protected[b, h].nonzero().flatten().tolist()) <= set(slots.tolist())


def test_what_the_positional_policies_keep():
    view = draw(kvpolicy.load("recent-pinned").build())
    for name in ("streaming-llm", "sinks-recent"):
        (kept,) = kvpolicy.load(name).replace("budget.tokens", 24).build().select([view], [24, 24])
        assert kept.indices[0, 0].tolist() == [*range(4), *range(70, 90)]
        assert kept.indices[1, 1].tolist() == [*range(4), *range(57, 77)]
    (kept,) = kvpolicy.load("recent-pinned").replace("budget.tokens", 30).build().select([view], [30, 30])
    assert kept.indices[0, 0].tolist() == [*range(20), *range(80, 90)]
    assert kept.indices[1, 0].tolist() == [*range(11), *range(58, 77)]


def test_the_random_control_protects_what_rkv_protects():
    random, rkv = kvpolicy.load("random").build(), kvpolicy.load("rkv").build()
    assert (random.protections, random.trigger, random.budget) == (rkv.protections, rkv.trigger, rkv.budget)
