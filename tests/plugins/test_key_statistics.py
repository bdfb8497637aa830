"""Scores from statistics of keys, values and queries, each against its formula in double precision and plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy import ops, tables
from kvpolicy.contracts.view import Rope
from kvpolicy.tables import Table
from kvsupport.statistic_views import ROPES, expect, make, normal, turned


def test_key_diff(view):
    def reference(_b, _h, keys, _values, _positions):
        mean = sum(k / k.norm() for k in keys) / len(keys)
        return [-(k @ mean) / (k.norm() * mean.norm()) for k in keys]

    expect(view, make("key_diff").score(view), reference)


def test_key_diff_by_hand(make_view):
    """The mean of (1,0), (1,0) and (0,1) is (2,1)/3; its cosines are 2 and 1 over the square root of 5."""
    keys = torch.tensor([[[[3.0, 0.0], [0.5, 0.0], [0.0, 7.0], [0.0, 0.0]]]])
    valid = torch.tensor([[[True, True, True, False]]])
    expected = [-2 / math.sqrt(5), -2 / math.sqrt(5), -1 / math.sqrt(5), 0.0]
    assert make("key_diff").score(make_view(keys, valid=valid)).flatten().tolist() == pytest.approx(expected)


def lag_reference(keys, values, lag, sinks, ranked):
    count = len(keys)
    if count < sinks + 2 * lag:
        return [1.0 if i < sinks else (i - sinks) / (count - sinks) for i in range(count)]
    scores = [1.0] * count
    for first in range(sinks, count - 2 * lag + 1, lag):
        total = torch.zeros(lag, dtype=torch.float64)
        for x in (keys, values):
            reference = x[first + lag : first + 2 * lag]
            low, high = reference.min(0).values, reference.max(0).values
            deviations = torch.stack([((row - low) / (high - low)).std() for row in x[first : first + lag]])
            total += deviations.exp() / deviations.exp().sum()
        for i in range(lag):
            scores[first + i] = (total < total[i]).sum() / lag if ranked else total[i] / 2
    return scores


@pytest.mark.parametrize(
    ("lag", "sinks", "ranked"),
    [(4, 3, True), (4, 3, False), (5, 0, False), (3, 12, True), (7, 2, True), (128, 4, True)],
)
def test_lag_relative(view, lag, sinks, ranked):
    def reference(_b, _h, keys, values, _positions):
        return lag_reference(keys, values, lag, sinks, ranked)

    expect(view, make("lag_relative", lag=lag, sinks=sinks, ranked=ranked).score(view), reference)


def test_lag_relative_without_variation(make_view):
    """A channel that the next partition holds still says nothing; one that all hold still is no division by 0."""
    keys = normal(1, 1, 12, 4)
    keys[..., 4:, 0] = 2.0
    still = torch.full_like(keys, 3.0)
    view = make_view(keys, values=still)
    scores = make("lag_relative", lag=4, sinks=0, ranked=False).score(view)
    assert scores.isfinite().all()
    without = keys.clone()
    without[..., 0] = 2.0
    assert torch.equal(scores, make("lag_relative", lag=4, sinks=0, ranked=False).score(replace(view, keys=without)))


@pytest.mark.parametrize("leverage", ["product", "mean", "key", "value"])
@pytest.mark.parametrize("window", [4, 0, 100])
def test_cur(view, leverage, window):
    def reference(_b, _h, keys, values, _positions):
        def shares(x):
            squares = (x * x).sum(-1)
            size = window or len(squares)
            return torch.cat([part / part.sum() for part in squares.split(size)])

        key, value = shares(keys), shares(values)
        score = {"product": key * value, "mean": (key + value) / 2, "key": key, "value": value}[leverage]
        return score / score.sum()

    expect(view, make("cur", leverage=leverage, window=window).score(view), reference)


def test_cur_of_large_and_small_numbers(view):
    expected = make("cur").score(view)
    for factor in (1e30, 1e-30):
        scaled = replace(view, keys=view.keys * factor, values=view.values * factor)
        torch.testing.assert_close(make("cur").score(scaled), expected)


@pytest.fixture
def read():
    """Return a function that makes a component while its table is the given tensors."""
    opened = []

    def made(name, kind, shape, tensors, **params):
        L, H, D = shape
        table = Table(kind, "test", "test", L, H, D, tensors)
        context = tables.supplying(lambda _name, _kind: table)
        context.__enter__()
        opened.append(context)
        return make(name, table="test", **params)

    yield made
    for context in opened:
        context.__exit__(None, None, None)


def test_q_filter(view, read):
    filters = normal(3, 2, 8)
    view = replace(view, layer_idx=2, num_layers=3)

    def reference(_b, h, keys, _values, _positions):
        return [k @ filters[2, h].double() for k in keys]

    expect(view, read("q_filter", "query_filters", (3, 2, 8), {"filters": filters}).score(view), reference)


@pytest.mark.parametrize("name", ["q_filter", "trigonometric"])
def test_missing_and_uniform_tables_are_refused(name, tmp_path):
    path = tmp_path / "none.safetensors"
    with pytest.raises(ValueError, match="there is no such file"):
        make(name, table=str(path))
    with pytest.raises(kvpolicy.errors.KVPolicyError, match="is uniform"):
        Table("query_filters", "test", "test", 3, 2, 8, {"filters": torch.ones(3, 2, 8)})


def pairs_of(x, rope):
    """Rotated dimensions as complex numbers, in double precision."""
    half = len(rope.inv_freq)
    x = x.double()
    if rope.interleaved:
        return torch.complex(x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2])
    return torch.complex(x[..., :half], x[..., half : 2 * half])


def with_statistics(view, rope, seed=9):
    """Add the statistics of some queries; return the queries too, `[B, H, G, Q, D]`, without rotation."""
    B, H, _, D = view.keys.shape
    queries = normal(B, H, 3, 50, D, seed=seed) + normal(B, H, 3, 1, D, seed=seed + 1)
    mean = queries.mean(3)
    centred = queries - mean.unsqueeze(3)
    extras = {"query_mean": mean, "query_covariance": centred.mT @ centred / 50, "query_count": torch.tensor([50] * B)}
    return replace(view, rope=rope, extras=extras), queries


def expected_reference(view, queries, rope, params):
    future, sinks = params.get("future", 512), params.get("sinks", 4)

    def reference(b, h, keys, values, positions):
        ahead = range(int(view.seen[b]), int(view.seen[b]) + future)
        average = sum(turned(torch.eye(8), rope, t) for t in ahead).T / future
        inside = positions >= sinks
        weights = torch.zeros(len(keys), dtype=torch.float64)
        for q in queries[b, h].double():
            mean, covariance = average @ q.mean(0), average @ torch.cov(q.T, correction=0) @ average.T
            logits = [view.scale * (k @ mean) for k in keys]
            if params.get("covariance", True):
                logits = [x + view.scale**2 * (k @ covariance @ k) / 2 for x, k in zip(logits, keys, strict=True)]
            powers = torch.stack(logits).exp() * inside
            weights += powers / powers.sum() / len(queries[b, h])
        if params.get("value_norm", True):
            weights = (weights + params.get("epsilon", 0.0)) * values.norm(dim=-1)
        return torch.where(inside, weights, weights[inside].max())

    return reference


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(
    "params",
    [{}, {"covariance": False, "future": 3}, {"epsilon": 0.02, "sinks": 30}, {"value_norm": False, "sinks": 0}],
    ids=str,
)
def test_expected_attention(view, rope, params):
    rope = ROPES[rope]
    view, queries = with_statistics(view, rope)
    expect(view, make("expected_attention", **params).score(view), expected_reference(view, queries, rope, params))


def test_expected_attention_is_the_expectation(make_view):
    """Without rotation the logarithm is that of the mean exponential of normally distributed queries."""
    view = make_view(shape=(1, 1, 6, 8), rope=Rope(torch.zeros(4)))
    mean, spread = normal(8, seed=2), normal(8, 8, seed=3) / 2
    extras = {"query_mean": mean[None, None, None], "query_covariance": (spread @ spread.T)[None, None, None]}
    view = replace(view, extras=extras)
    drawn = mean + normal(200_000, 8, seed=4) @ spread.T
    mass = (drawn @ view.keys[0, 0].T * view.scale).exp().mean(0)
    scores = make("expected_attention", sinks=0, value_norm=False).score(view)[0, 0]
    torch.testing.assert_close(scores, mass / mass.sum(), rtol=0.02, atol=0)


def rerotated(view, rope):
    """The same entries in a cache whose keys stand at 0, 1, 2, ... with the next token right behind them."""
    rank = (view.valid.cumsum(-1) - 1).clamp(min=0)
    moved = ops.rotate(view.keys, rope, rank - view.positions)
    shifted = (rank + 7).to(torch.int32)  # further tokens have been appended and evicted since
    moved = ops.rotate(moved, rope, torch.full_like(rank, 7))
    return replace(view, keys=moved, rope_positions=shifted)


@pytest.mark.parametrize("name", ["expected_attention", "trigonometric"])
def test_the_future_begins_behind_re_rotated_keys(make_view, read, name):
    """A cache that was re-rotated scores as one in which the kept keys were the only tokens."""
    rope = ROPES["halves"]
    positions = torch.arange(0, 40, 2, dtype=torch.int32).expand(1, 2, 20)
    view, _ = with_statistics(make_view(shape=(1, 2, 20, 8), positions=positions, seen=torch.tensor([39])), rope)
    moved = rerotated(view, rope)
    fresh = replace(moved, positions=moved.rope_positions, seen=torch.tensor([27]), rope_positions=None)
    if name == "trigonometric":
        statistics = {"mean": normal(1, 2, 3, 3, 2), "magnitude": normal(1, 2, 3, 3).abs() + 3}
        scorer = read(name, "query_frequencies", (1, 2, 8), statistics)
    else:
        scorer = make(name, sinks=0)
    torch.testing.assert_close(scorer.score(moved), scorer.score(fresh))
    assert not torch.allclose(scorer.score(moved), scorer.score(view), rtol=1e-3)


@pytest.mark.parametrize(("distances", "group", "standardise"), [("mean", "max", True), ("max", "mean", False)])
@pytest.mark.parametrize("rope", ROPES)
def test_trigonometric(view, read, rope, distances, group, standardise):
    rope = ROPES[rope]
    half, reach = len(rope.inv_freq), 300
    mean, view = normal(2, 2, 3, half, 2), replace(view, rope=rope, layer_idx=1, num_layers=2)
    magnitude = mean.norm(dim=-1) + normal(2, 2, 3, half, seed=2).abs()
    frequencies = rope.inv_freq.double()

    def reference(b, h, keys, _values, positions):
        heads = []
        for g in range(3):
            query = torch.complex(*mean[1, h, g].double().unbind(-1))
            scores = []
            for k, p in zip(keys, positions.tolist(), strict=True):
                key = pairs_of(turned(k, rope, -p), rope)
                at = [
                    (query.abs() * key.abs() * torch.cos((int(view.seen[b]) + d - p) * frequencies + angle)).sum()
                    for d in (1, 2, 4, 8, 16, 32, 64, 128, 256)
                    for angle in [query.angle() - key.angle()]
                ]
                hidden = ((magnitude[1, h, g].double() - query.abs()) * key.abs()).sum()
                scores.append((max(at) if distances == "max" else sum(at) / len(at)) + hidden)
            scores = torch.stack(scores)
            heads.append((scores - scores.mean()) / scores.std(correction=0) if standardise else scores)
        heads = torch.stack(heads)
        return heads.amax(0) if group == "max" else heads.mean(0)

    statistics = {"mean": mean, "magnitude": magnitude}
    params = {"distances": distances, "group": group, "standardise": standardise, "reach": reach}
    scores = read("trigonometric", "query_frequencies", (2, 2, 8), statistics, **params).score(view)
    expect(view, scores, reference, atol=2e-5)  # numbers of the size of 10, in fp32
