"""The same scores as kvpress where it defines them, on real keys of SmolLM2 (`docs/kvpress.md`).

The committed file holds one head. With the interpreter of an environment that has kvpress in
``KVPOLICY_KVPRESS_PYTHON`` the slow test compares all layers and heads. Both come from `scripts/kvpress_scores.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import kvpolicy
from kvpolicy import ops, tables
from kvpolicy.cache.queries.statistics import QueryStatistics
from kvpolicy.contracts.components import AllocationRequest
from kvpolicy.contracts.view import CacheView, Rope
from kvpolicy.tables import Table

ROOT = Path(__file__).resolve().parents[2]
SMALL = Path(__file__).parent / "data" / "kvpress_smollm2.safetensors"
PYTHON = os.environ.get("KVPOLICY_KVPRESS_PYTHON")
TOLERANCE = 1e-5  # of the largest score of the head


@dataclass
class Layer:
    """A layer of the file: what we score, and what kvpress says."""

    index: int
    facts: dict[str, Any]
    view: CacheView
    plain: torch.Tensor  # queries without their rotary embedding
    tensors: dict[str, torch.Tensor]

    def size(self, name):
        return self.facts["sizes"][name]


def read(path):
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        everything = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    rope = Rope(everything.pop("inv_freq"))
    for index in facts["layers"]:
        prefix = f"{index}."
        tensors = {name.removeprefix(prefix): t for name, t in everything.items() if name.startswith(prefix)}
        yield _layer(index, facts, rope, tensors)


def _layer(index, facts, rope, tensors):
    keys, values = tensors["keys"].float(), tensors["values"].float()
    _, H, N, D = keys.shape
    plain = tensors["queries"].float().unflatten(1, (H, -1))
    at = torch.arange(N, dtype=torch.int32)
    turned = ops.rotate(plain, rope, at.expand(plain.shape[:-1]))
    everyone = torch.ones(1, N, dtype=torch.bool)
    statistics = QueryStatistics.empty(turned)
    statistics.add(turned, at[None], everyone, rope)
    view = CacheView(
        keys=keys,
        values=values,
        positions=at.expand(1, H, N),
        valid=torch.ones(1, H, N, dtype=torch.bool),
        scale=D**-0.5,
        layer_idx=index,
        num_layers=facts["num_layers"],
        prompt_length=torch.tensor([N]),
        seen=torch.tensor([N]),
        compaction=torch.tensor([0]),
        queries=turned,
        query_positions=at[None],
        query_valid=everyone,
        rope=rope,
        rope_positions=at.expand(1, H, N),
        extras=statistics.extras(slice(None)),
    )
    return Layer(index, facts, view, plain, tensors)


def score(layer, name, **params):
    return kvpolicy.catalog().get("importance", name)(**params).score(layer.view)


def snapkv(layer):
    window = layer.size("window")
    ours = score(
        layer, "window_attention", observe=window, group="mean", group_stage="weights", softmax_over="row",
        smooth=layer.size("kernel"), smooth_kind="mean_zero_padded",
    )  # fmt: skip
    return ours[..., :-window], layer.tensors["snapkv"][..., :-window]


def tova(layer):
    ours = score(layer, "tova").mean(1, keepdim=True).expand(layer.view.shape)
    return ours[..., :-1], layer.tensors["tova"][..., :-1]


def lagkv(layer):
    """Ranks; equal numbers share one of ours, and get consecutive ones in any order of kvpress's."""
    lag = layer.size("lag")
    ours, theirs, unranked = score(layer, "lag_relative", lag=lag), layer.tensors["lagkv"], lagkv_cross(layer)[0]
    twins = torch.zeros_like(ours)
    for first in range(4, ours.shape[-1], lag):
        part = unranked[..., first : first + lag]
        twins[..., first : first + lag] = (part.unsqueeze(-1) == part.unsqueeze(-2)).sum(-1) - 1
    tied = (twins > 0) & (theirs < 1)
    assert tied.float().mean() < 0.01
    assert ((theirs - ours)[tied] * lag <= twins[tied]).all()
    return torch.where(tied, theirs, ours), theirs


def lagkv_cross(layer):
    return score(layer, "lag_relative", lag=layer.size("lag"), ranked=False), layer.tensors["lagkv_cross"]


def cur(layer):
    return score(layer, "cur", window=layer.size("cur_window"))[..., 4:], layer.tensors["cur"][..., 4:]


def cur_mean(layer):
    ours = score(layer, "cur", window=layer.size("cur_window"), leverage="mean")
    return ours[..., 4:], layer.tensors["cur_mean"][..., 4:]


def cur_key(layer):
    return score(layer, "cur", window=0, leverage="key")[..., 4:], layer.tensors["cur_key"][..., 4:]


def expected_attention(layer):
    ours = score(layer, "expected_attention", future=layer.size("future"))
    return ours[..., 4:], layer.tensors["expected_attention"][..., 4:]


def expected_attention_mean(layer):
    ours = score(layer, "expected_attention", future=layer.size("future"), covariance=False, epsilon=0.01)
    return ours[..., 4:], layer.tensors["expected_attention_mean"][..., 4:]


def non_causal(layer):
    view = layer.view
    scorer = kvpolicy.catalog().get("importance", "non_causal")(chunk=layer.size("chunk"), sinks=0)
    state = {s.name: torch.full(view.shape, s.fill, dtype=s.dtype) for s in scorer.slot_state()}
    for first in range(0, view.shape[2], 32):
        part = slice(first, first + 32)
        seen = replace(view, state=state)
        state = dict(
            scorer.observe_queries(
                seen, view.queries[:, :, :, part], view.query_positions[:, part], view.query_valid[:, part]
            )
        )
    ours = scorer.score(replace(view, state=state))
    return (ours - ours.mean()) / ours.std(), layer.tensors["non_causal"]


def q_filter(layer):
    filters = -layer.tensors["q_filter_filters"]  # the released filters point away from what is attended to
    _, H, _, D = layer.view.keys.shape
    every = filters.expand(layer.facts["num_layers"], H, D) + torch.zeros(layer.facts["num_layers"], 1, 1)
    every = every.clone()
    every[(layer.index + 1) % len(every)] *= 2  # the table of another layer would show
    table = Table("query_filters", "test", "test", layer.facts["num_layers"], H, D, {"filters": every})
    with tables.supplying(lambda _name, _kind: table):
        return score(layer, "q_filter", table="test"), layer.tensors["q_filter"]


SAME = {
    "knorm": lambda layer: (score(layer, "key_norm"), layer.tensors["knorm"]),
    "keydiff": lambda layer: (score(layer, "key_diff"), layer.tensors["keydiff"]),
    "snapkv": snapkv,
    "tova": tova,
    "lagkv": lagkv,
    "lagkv_cross": lagkv_cross,
    "cur": cur,
    "cur_mean": cur_mean,
    "cur_key": cur_key,
    "expected_attention": expected_attention,
    "expected_attention_mean": expected_attention_mean,
    "non_causal": non_causal,
    "q_filter": q_filter,
}


def difference(ours, theirs):
    """Largest difference, as a share of the largest score of the head."""
    assert ours.shape == theirs.shape
    assert ours.std() > 0
    return ((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max().item()


@pytest.fixture(scope="module")
def small():
    (layer,) = read(SMALL)
    return layer


@pytest.mark.parametrize("name", SAME)
def test_scores(small, name):
    assert difference(*SAME[name](small)) < TOLERANCE


def streaming_llm(layer):
    """Return our kept slots, and kvpress's."""
    N = layer.view.shape[2]
    budget = int(N * (1 - layer.facts["streaming_llm_ratio"]))
    policy = kvpolicy.load("streaming-llm").replace("budget.tokens", budget).build()
    (kept,) = policy.select([layer.view], [budget])
    return kept.mask(N), layer.tensors["streaming_llm"] == 1


def test_streaming_llm_keeps_the_same(small):
    ours, theirs = streaming_llm(small)
    assert torch.equal(ours, theirs)


def test_leverage_up_to_the_ridge(small):
    """kvpress adds 0.01 to the diagonal, whatever the size of the keys; we add a share of it."""
    plain = ops.rotate(small.view.keys, small.view.rope, -small.view.positions)
    ours = ops.leverage(plain, small.view.valid, small.tensors["leverage_sketch"])
    assert difference(ours, small.tensors["leverage"]) < 5e-3


@pytest.mark.parametrize("place", range(5))
def test_pyramid_budgets(small, place):
    """Within rounding of kvpress's, which do not add up to the budget; kvpress counts its window as part of them."""
    asked, theirs = list(small.facts["pyramid"].items())[place]
    length, ratio = int(asked.split()[0]), float(asked.split()[1])
    count = small.facts["num_layers"]
    every = [torch.full((1, 3), length)] * count
    blank = [torch.zeros(1, 3, length)] * count
    request = AllocationRequest(
        budget=torch.tensor([round(length * (1 - ratio))]),
        valid=every,
        protected=[torch.zeros_like(n) for n in every],
        scores=blank,
        masks=[b == 0 for b in blank],
        protected_masks=[b != 0 for b in blank],
        layers=list(range(count)),
        num_layers=count,
    )
    counts = torch.cat(kvpolicy.catalog().get("allocator", "pyramid")(beta=20.0).allocate(request))
    assert (counts == counts[:, :1]).all()
    assert (counts[:, 0] - torch.tensor(theirs)).abs().max() <= 1
    assert counts[:, 0].sum() == count * request.budget


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="KVPOLICY_KVPRESS_PYTHON names no environment with kvpress")
def test_all_layers_and_heads(tmp_path):
    from kvpolicy.runtimes.hf.demo_model import ensure_demo_model

    out = tmp_path / "scores.safetensors"
    command = [PYTHON, ROOT / "scripts" / "kvpress_scores.py", "--model", ensure_demo_model()]
    done = subprocess.run(
        [*command, "--text", ROOT / "LICENSE", out], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    largest = dict.fromkeys(SAME, 0.0)
    for layer in read(out):
        for name, compare in SAME.items():
            largest[name] = max(largest[name], difference(*compare(layer)))
        ours, theirs = streaming_llm(layer)
        assert torch.equal(ours, theirs)
    print(json.dumps(largest))
    assert max(largest.values()) < TOLERANCE, largest
