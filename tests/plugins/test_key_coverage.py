"""`key_coverage`, `value_weighted`, and `rkv-density` against a literal implementation without the ops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy.errors import ScoreError, SpecError, UnsupportedError
from kvpolicy.policy.scoring import once


def make(kind, name, **params):
    return kvpolicy.catalog().get(kind, name)(**params)


RECENCY, NORM = make("importance", "recency"), make("importance", "value_norm")


def coverage(keys, matters, bandwidth, lower):
    """The definition, of keys `[n, D]` in float64; of two that matter alike the newer one comes first."""
    unit = [k / k.norm() for k in keys]
    rank = [(float(m), i) for i, m in enumerate(matters)]
    total = []
    for i, a in enumerate(unit):
        near = [
            (1.0 if rank[j] > rank[i] else lower) * math.exp((float(a @ b) - 1) / bandwidth)
            for j, b in enumerate(unit)
            if j != i
        ]
        total.append(math.fsum(near) / len(unit))
    return torch.tensor(total, dtype=torch.float64)


def unrotated(view, head):
    """Keys `[n, D]` of row 0 in float64, turned back with complex numbers."""
    angle = view.positions[0, head].double()[:, None] * view.rope.inv_freq.double()
    pairs = torch.view_as_complex(torch.stack(view.keys[0, head].double().chunk(2, dim=-1), dim=-1))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), -angle)).flatten(1)


def test_of_alike_keys_the_one_that_matters_most_is_covered_least(make_view):
    """Four copies with value norms 1, 9, 1, 5, and a key at a right angle."""
    keys = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[None, None]
    values = torch.tensor([1.0, 9.0, 1.0, 5.0, 2.0])[None, None, :, None].expand(1, 1, 5, 2)
    view = replace(make_view(keys), values=values)
    got = make("redundancy", "key_coverage", rope="post", by=NORM, lower=0.0).score(view)[0, 0]
    far = math.exp(-5)  # to the key at a right angle, which matters more than two and less than two
    expected = [3 + far, 0, 2 + far, 1, 2 * far]
    assert (5 * got).tolist() == pytest.approx(expected, abs=1e-5)
    all_count = make("redundancy", "key_coverage", rope="post", by=NORM, lower=1.0).score(view)
    torch.testing.assert_close(all_count, make("redundancy", "key_density", rope="post").score(view))


@pytest.mark.parametrize("params", [{}, {"rope": "post"}, {"bandwidth": 0.05, "lower": 0.0}, {"lower": 0.7}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_definition_where_slots_are_valid(make_view, params, dtype):
    generator = torch.Generator().manual_seed(2)
    valid = torch.rand(1, 3, 90, generator=generator) < 0.8
    valid[0, 2] = False
    view = make_view(shape=(1, 3, 90, 8), valid=valid)
    view = replace(view, keys=torch.where(valid[..., None], view.keys + 1, float("nan")).to(dtype))
    scorer = make("redundancy", "key_coverage", by=NORM, **params)
    got = scorer.score(view)
    assert got.dtype == torch.float32
    assert (got[~valid] == 0).all()
    for h in range(2):
        held = valid[0, h]
        keys = (view.keys[0, h].double() if params.get("rope") == "post" else unrotated(view, h))[held]
        expected = coverage(keys, view.values[0, h][held].norm(dim=-1), scorer.bandwidth, scorer.lower)
        torch.testing.assert_close(got[0, h][held].double(), expected, rtol=1e-4, atol=1e-6)


def test_equal_importance_but_for_rounding_goes_to_the_newer_key(make_view):
    keys = torch.tensor([[1.0, 0.0]]).expand(1, 1, 3, 2)
    values = torch.tensor([1.0, 1.0 - 1e-7, 1.0 - 2e-7])[None, None, :, None]
    view = replace(make_view(keys), values=values)
    got = make("redundancy", "key_coverage", rope="post", by=NORM, lower=0.0).score(view)
    assert (3 * got[0, 0]).tolist() == pytest.approx([2, 1, 0])
    newer = make("redundancy", "key_coverage", rope="post", by=RECENCY, lower=0.0).score(view)
    assert torch.equal(newer, got)


def test_scores_below_0_are_counted_from_the_lowest(make_view):
    """Norms of equal keys that differ by rounding: the newer key matters more in either order."""
    for lengths in ((1.0 + 1.2e-7, 1.0), (1.0, 1.0 + 1.2e-7)):
        keys = torch.tensor([[5.0, 0.0], *([length, 0.0] for length in lengths)])[None, None]
        scorer = make("redundancy", "key_coverage", rope="post", by=make("importance", "key_norm"), lower=0.0)
        assert (3 * scorer.score(make_view(keys))[0, 0]).tolist() == pytest.approx([2, 1, 0])


def test_what_it_needs_is_what_its_parts_need(make_view):
    by = {"use": "window_attention", "observe": 16}
    policy = kvpolicy.load(
        "rkv", importance="recency", redundancy={"use": "key_coverage", "by": by}, mixer="rank"
    ).build()
    assert policy.needs == {"rope", "queries"}
    assert policy.observed_queries == 16
    assert make("redundancy", "key_coverage", rope="post", by=NORM).needs == frozenset()
    with pytest.raises(UnsupportedError, match=r"redundancy: key_coverage with `rope: pre` needs the rotary embedding"):
        make("redundancy", "key_coverage", by=NORM).score(make_view(rope=None))


def test_the_same_scorer_with_memory_serves_importance_and_redundancy():
    redundancy = {"use": "key_coverage", "by": "decayed_attention"}
    policy = kvpolicy.load("rkv", importance="decayed_attention", redundancy=redundancy, mixer="rank").build()
    assert [state.name for state in policy.slot_states] == ["decayed_attention"]
    other = {"use": "key_coverage", "by": {"use": "decayed_attention", "decay": 0.5}}
    with pytest.raises(SpecError, match="slot state 'decayed_attention': two components"):
        kvpolicy.load("rkv", importance="decayed_attention", redundancy=other, mixer="rank").build()


def test_importance_that_serves_twice_is_computed_once(make_view, monkeypatch):
    window = kvpolicy.catalog().get("importance", "window_attention")
    asked, score = [], window.score
    monkeypatch.setattr(window, "score", lambda self, view: asked.append(self) or score(self, view))
    view = make_view(shape=(1, 2, 40, 8), queries=torch.randn(1, 2, 3, 16, 8))
    policy = kvpolicy.load("rkv-density", budget=20).build()
    together = policy.scores(view)
    assert len(asked) == 1
    assert torch.equal(together.importance, policy.importance.score(replace(view)))
    assert torch.equal(together.redundancy, policy.redundancy.score(replace(view)))
    assert len(asked) == 3, "nothing is kept from one view to the next"


@pytest.mark.parametrize("what", ["keys", "values"])
def test_a_number_that_is_none_is_not_hidden_by_its_rank(make_view, what):
    view = make_view(shape=(1, 2, 40, 8), queries=torch.randn(1, 2, 3, 16, 8))
    broken = getattr(view, what).clone()
    broken[0, 1, 5] = float("nan")
    policy = kvpolicy.load("rkv-density", budget=20).build()
    policy.select([view], [20])
    with pytest.raises(ScoreError):
        policy.select([replace(view, **{what: broken})], [20])


@pytest.mark.parametrize("norm", [1, 2])
def test_value_weighted_is_the_product(make_view, norm):
    view = make_view(shape=(2, 2, 40, 8), queries=torch.randn(2, 2, 3, 8, 8))
    base = make("importance", "window_attention")
    expected = base.score(view) * view.values.norm(norm, dim=-1)
    torch.testing.assert_close(make("importance", "value_weighted", norm=norm).score(view), expected)
    below = make("importance", "value_weighted", base=make("importance", "key_norm"), norm=norm).score(view)
    height = view.keys.norm(dim=-1).amax(-1, keepdim=True) - view.keys.norm(dim=-1)
    torch.testing.assert_close(below, height * view.values.norm(norm, dim=-1))


def test_a_policy_takes_for_equal_what_differs_by_rounding(make_view):
    values = torch.tensor([1.0, 1.0 + 2e-7, 1.0 + 1e-5])[None, None, :, None]
    view = replace(make_view(torch.randn(1, 1, 3, 2)), values=values)
    scores = once(make("importance", "value_weighted", base=make("importance", "value_norm")), view)[0, 0].tolist()
    assert scores[0] == scores[1] < scores[2]


def test_value_weighted_does_not_overflow_in_half_precision(make_view):
    view = make_view()
    large = replace(view, values=torch.full_like(view.values, 60000).half())
    scores = make("importance", "value_weighted", base=RECENCY).score(large)
    assert scores.isfinite().all()
    torch.testing.assert_close(scores, view.positions * 60000 * math.sqrt(view.values.shape[-1]))


@pytest.mark.parametrize("draw", range(6))
def test_kept_set_of_the_policy_equals_its_definition(make_view, draw):
    """Attention times value norm against coverage, as ranks; sinks and the newest stay."""
    generator = torch.Generator().manual_seed(draw)
    n, budget, dim, groups, asked = 100, 40 + 5 * draw, 16, 3, 16
    policy = kvpolicy.load("rkv-density", budget=budget).build()
    weight, bandwidth, lower = policy.mixer.weight, policy.redundancy.bandwidth, policy.redundancy.lower
    keys = torch.randn(1, 2, 1, dim, generator=generator) + torch.randn(1, 2, n, dim, generator=generator)
    view = make_view(keys, queries=2 * torch.randn(1, 2, groups, asked, dim, generator=generator))
    kept = policy.select([view], [budget])[0]
    older = n - asked
    for h in range(2):
        queries, values = view.queries[0, h].double(), view.values[0, h].double()
        logits = torch.einsum("gqd,nd->gqn", queries, view.keys[0, h, :older].double()) * view.scale
        seen = torch.softmax(logits, -1).mean((0, 1)).tolist()
        smooth = [max(seen[max(i - 3, 0) : i + 4]) for i in range(older)]
        attention = torch.tensor(smooth + [max(smooth)] * asked, dtype=torch.float64)
        matters = attention * values.norm(dim=-1)

        def places(x):
            return ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1) - 1).double() / 2

        covered = coverage(unrotated(view, h), matters, bandwidth, lower)
        score = weight * places(matters) - (1 - weight) * places(covered)  # multiples of 1/32: exact
        score[:4] = score[-8:] = torch.inf
        order = sorted(range(n), key=lambda i: (-float(score[i]), i))
        assert kept.indices[0, h].tolist() == sorted(order[:budget])
