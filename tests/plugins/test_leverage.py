"""Leverage scores and non-causal attention, against float64 definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy import ops
from kvpolicy.contracts.view import Rope
from kvpolicy.errors import UnsupportedError
from kvsupport.statistic_views import ROPES, expect, make, normal, turned


def leverage_reference(view, rope, sinks, projection):
    def reference(_b, _h, keys, _values, positions):
        plain = torch.stack([turned(k, rope, -int(p)) for k, p in zip(keys, positions, strict=True)])
        inside = positions >= sinks
        x = plain[inside] - plain[inside].mean(0)
        x = x if projection is None else x @ projection.double()
        hat = x @ torch.linalg.pinv(x)
        scores = torch.zeros(len(keys), dtype=torch.float64)
        scores[inside] = hat.diagonal()
        return torch.where(inside, scores, scores.max())

    return reference


@pytest.mark.parametrize(("sketch", "sinks"), [(0, 0), (0, 8), (5, 8), (48, 20)])
@pytest.mark.parametrize("rope", ROPES)
def test_leverage(view, rope, sketch, sinks):
    rope = ROPES[rope]
    view = replace(view, rope=rope)
    projection = ops.gaussian_sketch(8, sketch, 3, view.device) if sketch else None
    scores = make("leverage", sketch=sketch, sinks=sinks, seed=3).score(view)
    reference = leverage_reference(view, rope, sinks, projection)
    expect(view, scores, reference, atol=1e-5)  # the ridge is 1e-7 of the trace


def test_leverage_of_few_or_equal_keys(make_view):
    few = make_view(shape=(1, 1, 3, 8))
    assert make("leverage", sinks=0).score(few).flatten().tolist() == pytest.approx([2 / 3] * 3, abs=1e-4)
    equal = make_view(torch.ones(1, 1, 5, 8), rope=Rope(torch.zeros(4)))
    assert make("leverage", sinks=0).score(equal).abs().max() < 1e-3


def test_the_sketch_is_normal():
    sketch = ops.gaussian_sketch(64, 200, 0, torch.device("cpu")) * math.sqrt(200)
    assert abs(sketch.mean()) < 0.03
    assert sketch.std() == pytest.approx(1.0, abs=0.03)
    assert (sketch.abs() < 1).float().mean() == pytest.approx(0.6827, abs=0.02)
    assert torch.equal(sketch, ops.gaussian_sketch(64, 200, 0, torch.device("cpu")) * math.sqrt(200))
    other = ops.gaussian_sketch(64, 200, 1, torch.device("cpu")) * math.sqrt(200)
    assert abs((sketch * other).mean()) < 0.03


def observed(scorer, view, queries, positions, valid, block):
    """Feed all queries in blocks; return the view with the state that they leave."""
    state = {s.name: torch.full(view.shape, s.fill, dtype=s.dtype) for s in scorer.slot_state()}
    for first in range(0, queries.shape[3], block):
        part = slice(first, first + block)
        seen = replace(view, state=state)
        state = dict(scorer.observe_queries(seen, queries[:, :, :, part], positions[:, part], valid[:, part]))
    return replace(view, state=state)


@pytest.mark.parametrize(
    "params", [{}, {"smooth": 1, "scaled": True}, {"sinks": 0, "chunk": 4}, {"chunk": 64}], ids=str
)
@pytest.mark.parametrize("block", [5, 32])
def test_non_causal(make_view, params, block):
    params = {"chunk": 8, "sinks": 3, **params}
    lengths = [37, 30]  # the second row is padded on the left
    at = torch.arange(37, dtype=torch.int32) - torch.tensor([[0], [7]], dtype=torch.int32)
    asked = at >= 0
    view = make_view(shape=(2, 2, 37, 8), valid=asked[:, None].expand(2, 2, 37), positions=at[:, None].expand(2, 2, 37))
    nothing = torch.where(view.valid, 0.0, float("nan"))[..., None]
    prompts = torch.tensor(lengths)
    view = replace(view, keys=view.keys + nothing, values=view.values + nothing, prompt_length=prompts)
    queries = normal(2, 2, 3, 37, 8) + nothing.unsqueeze(2)
    scorer = make("non_causal", **params)
    chunk, sinks, smooth = params["chunk"], params["sinks"], params.get("smooth", 3)

    def reference(b, h, keys, values, _positions):
        asks = queries[b, h][:, asked[b]].double()
        received = torch.zeros(lengths[b], dtype=torch.float64)
        for first in range(sinks, lengths[b], chunk):
            part = slice(first, min(first + chunk, lengths[b]))
            logits = asks[:, part] @ keys[part].T * (view.scale if params.get("scaled") else 1.0)
            received[part] = torch.softmax(logits, -1).sum(1).mean(0)
        weighted = (received * values.norm(dim=-1))[sinks:]
        reach = smooth // 2
        smoothed = [weighted[max(i - reach, 0) : i + reach + 1].sum() / smooth for i in range(len(weighted))]
        return [max(smoothed)] * sinks + smoothed

    expect(view, scorer.score(observed(scorer, view, queries, at, asked, block)), reference)


def test_non_causal_does_not_see_what_comes_behind_the_prompt(make_view):
    """Or a score would depend on whether the next tokens were there when the prompt's queries were fed."""
    scorer, positions = make("non_causal", chunk=8, sinks=3), torch.arange(20, dtype=torch.int32)
    view = replace(make_view(torch.randn(1, 2, 20, 8)), prompt_length=torch.tensor([13]))
    short = replace(
        view, keys=view.keys[:, :, :13], values=view.values[:, :, :13], positions=view.positions[:, :, :13],
        valid=view.valid[:, :, :13],
    )  # fmt: skip
    queries, at, real = torch.randn(1, 2, 3, 20, 8), positions[None], torch.ones(1, 20, dtype=torch.bool)
    late = observed(scorer, view, queries, at, real, 20).state
    early = observed(scorer, short, queries[:, :, :, :13], at[:, :13], real[:, :13], 13).state
    for name, state in late.items():
        torch.testing.assert_close(state[:, :, :13], early[name])
        assert not state[:, :, 13:].any()


def test_negative_is_what_a_mixer_adds(view):
    view = replace(view, rope=ROPES["halves"])
    base = make("leverage", sketch=0, sinks=0)
    score = base.score(view)
    redundancy = make("negative", "redundancy", base=base)
    assert redundancy.needs | set().union(*(part.needs for part in redundancy.members())) == {"rope"}
    assert torch.equal(redundancy.score(view), -score)
    mixed = make("z_score", "mixer", weight=0.5).mix(score, redundancy.score(view), view)
    torch.testing.assert_close(mixed[view.valid], ops.z_scores(score, view.valid)[view.valid])


@pytest.mark.parametrize("name", ["expected_attention", "leverage"])
def test_what_the_view_lacks_is_refused(make_view, name):
    view = make_view(shape=(1, 1, 6, 8), rope=None)
    with pytest.raises(UnsupportedError, match=f"importance: {name} needs"):
        make(name).score(view)


def test_non_causal_is_for_prompts():
    assert make("non_causal").phases == {"prefill"}
    with pytest.raises(kvpolicy.SpecError, match="works at prefill only"):
        kvpolicy.PolicySpec(policy="test", budget=64, trigger={"every": 8}, importance="non_causal").build()
