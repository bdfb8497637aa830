"""Scorers of kvpress as importance. Runs where kvpress is installed, in a process of its own: importing it patches."""

from __future__ import annotations

import pytest
import torch

kvpress = pytest.importorskip(
    "kvpress", reason="kvpress is not installed; it needs transformers < 5.3, see docs/bridges.md"
)

import kvpolicy  # noqa: E402
from kvpolicy import PolicySpec, SpecError, UnsupportedError  # noqa: E402
from kvpolicy.contracts.view import CacheView  # noqa: E402
from kvpolicy.testing import check_component  # noqa: E402


def view(valid, dim=16, seed=0, budget=None):
    draw = torch.Generator().manual_seed(seed)
    rows, heads, slots = valid.shape
    keys, values = torch.randn(2, rows, heads, slots, dim, generator=draw)
    poison = torch.where(valid.unsqueeze(-1), 0.0, float("nan"))
    ones = torch.ones(rows, dtype=torch.int64)
    return CacheView(
        keys=keys + poison,
        values=values + poison,
        positions=torch.arange(slots, dtype=torch.int32).expand(rows, heads, slots),
        valid=valid,
        scale=0.25,
        layer_idx=1,
        num_layers=2,
        prompt_length=ones,
        seen=ones * slots,
        compaction=ones * 0,
        budget=None if budget is None else torch.tensor(budget),
    )


def scorer(press, **parameters):
    return kvpolicy.catalog().get("importance", "kvpress")(press=press, parameters=parameters)


def holes():
    valid = torch.ones(3, 2, 60, dtype=torch.bool)
    valid[0, :, 40:] = False
    valid[1, 0, ::7] = False
    valid[1, 1, 2::7] = False
    valid[2] = False
    return valid


@pytest.mark.parametrize(
    ("press", "parameters"),
    [("KnormPress", {}), ("KeyDiffPress", {}), ("LagKVPress", {"lag_size": 8, "n_sink": 2}), ("CURPress", {})],
)
def test_a_row_gets_the_scores_that_kvpress_gives_it_alone(press, parameters):
    seen = view(holes())
    seen = CacheView(**{**vars(seen), "valid": seen.valid.clone()})
    counts = seen.valid.sum(-1)
    keep = (counts[:, 0] == counts[:, 1]) & (counts[:, 0] > 0)
    assert keep.tolist() == [True, True, False]
    scores = scorer(press, **parameters).score(seen)
    for row in range(2):
        keys, values = (
            torch.stack([t[row, head][seen.valid[row, head]] for head in range(2)])[None]
            for t in (seen.keys, seen.values)
        )
        expected = getattr(kvpress, press)(**parameters).score(None, None, keys, values, None, None)
        for head in range(2):
            assert torch.equal(scores[row, head][seen.valid[row, head]], expected[0, head].float())
    assert (scores[2] == 0).all()


def test_the_ratio_follows_from_the_budget():
    valid = torch.ones(2, 2, 40, dtype=torch.bool)
    scores = scorer("StreamingLLMPress", n_sink=4).score(view(valid, budget=[10, 30]))
    assert (scores == 1).sum(-1).tolist() == [[10, 10], [30, 30]]
    assert (scores[0, 0] == 1).nonzero().flatten().tolist() == [0, 1, 2, 3, *range(34, 40)]


REFUSED = {
    "SnapKVPress": "SnapKVPress reads the attention module",
    "ExpectedAttentionPress": "ExpectedAttentionPress reads ",
    "TOVAPress": "TOVAPress ",
    "ObservedAttentionPress": "ObservedAttentionPress ",
    "QFilterPress": "QFilterPress reads the model",
    "PyramidKVPress": "PyramidKVPress does more than score",
    "RandomPress": "RandomPress draws random numbers",
    "ThinKPress": "kvpress has no scorer 'ThinKPress'",
    "KnromPress": "kvpress has no scorer 'KnromPress'",
}


@pytest.mark.parametrize(("press", "message"), REFUSED.items())
def test_what_a_view_cannot_serve_is_refused_when_the_policy_is_loaded(press, message):
    text = "schema_version: 1\npolicy: p\nbudget: 64\ntrigger: {every: 8}\nimportance: {use: kvpress, press: NAME}\n"
    with pytest.raises(SpecError, match=r"p\.yaml:5:") as caught:
        PolicySpec.from_yaml(text.replace("NAME", press), "p.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_parameters_are_refused():
    with pytest.raises(ValueError, match="KnormPress does not take these parameters"):
        scorer("KnormPress", norm=2)
    with pytest.raises(ValueError, match="compression_ratio follows from the budget"):
        scorer("KnormPress", compression_ratio=0.5)


def test_heads_of_different_lengths_are_scored_one_by_one_or_refused(monkeypatch):
    valid = torch.ones(1, 2, 20, dtype=torch.bool)
    valid[0, 0, 5] = False
    seen = view(valid)
    scores = scorer("KeyDiffPress").score(seen)
    keys = seen.keys[:, :1][:, :, valid[0, 0]]
    expected = kvpress.KeyDiffPress().score(None, None, keys, keys, None, None)
    assert torch.equal(scores[0, 0][valid[0, 0]], expected[0, 0])

    class Together(kvpress.KnormPress):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            return (
                super()
                .score(module, hidden_states, keys, values, attentions, kwargs)
                .mean(1, True)
                .expand(keys.shape[:3])
            )

    monkeypatch.setattr(kvpress, "Together", Together, raising=False)
    together = scorer("Together")
    assert together.score(view(torch.ones_like(valid))).shape == valid.shape
    with pytest.raises(UnsupportedError, match="hold different numbers of entries"):
        together.score(seen)


def test_it_obeys_the_laws():
    for result in check_component(kvpolicy.catalog().get("importance", "kvpress")):
        result.expect()


def test_a_specification_reads_back_and_is_a_value():
    spec = PolicySpec(
        policy="p",
        budget=64,
        trigger={"every": 8},
        importance={"use": "kvpress", "press": "LagKVPress", "parameters": {"lag_size": 16}},
    )
    assert PolicySpec.from_yaml(spec.to_yaml()) == spec
    assert len({spec.importance, PolicySpec.from_yaml(spec.to_yaml()).importance}) == 1


@pytest.mark.slow
def test_it_generates_as_our_own_component_does(smollm2):
    from kvpolicy.runtimes.hf import PolicyCache

    model, tokenizer = smollm2
    inputs = tokenizer("The three states of water are", return_tensors="pt")
    kept = []
    for importance in ("key_norm", {"use": "kvpress", "press": "KnormPress"}):
        spec = kvpolicy.load("knorm", budget=16, trigger__every=4).replace("importance", importance)
        with PolicyCache(spec, model) as cache:
            text = model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False)
            kept.append((text.tolist(), [cache.kept(layer, 1) for layer in range(30)]))
    assert kept[0] == kept[1]


def test_importing_kvpress_changes_no_result():
    import subprocess
    import sys

    program = """
import torch
from kvpolicy.testing.tiny import tiny_model
model = tiny_model("llama", attention="sdpa")
ids = torch.arange(4, 60)[None]
before = model(ids).logits
import kvpress
assert torch.equal(model(ids).logits, before)
from kvpolicy.runtimes.hf import PolicyCache
with PolicyCache("rkv", model) as cache, torch.no_grad():
    assert torch.allclose(model(ids, past_key_values=cache).logits, before, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")
