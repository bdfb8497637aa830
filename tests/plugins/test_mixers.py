"""Mixers and the mean key, against the papers' formulas in plain loops and double precision."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy.errors import UnsupportedError
from kvsupport.one_head import heads_of
from kvsupport.oracle_outputs import attention_mass


def make(kind, name, **params):
    return kvpolicy.catalog().get(kind, name)(**params)


def drawn(make_view, seed=0, shift=1.0, **fields):
    """A view with padding, a head with keys that are alike, and scores as attention and cosines are distributed."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.ones(2, 2, 20, dtype=torch.bool)
    valid[0, :, 17:], valid[1, 1, 4] = False, False
    keys = torch.randn(2, 2, 20, 8, generator=generator)
    keys[:, 1] += shift * torch.randn(8, generator=generator)
    image = (torch.arange(20) >= 6) & (torch.arange(20) < 13)
    view = make_view(
        keys=keys.masked_fill(~valid[..., None], float("nan")),
        valid=valid,
        extras={"modality": image.expand(2, 2, 20)},
        **fields,
    )
    view = replace(view, values=view.values.masked_fill(~valid[..., None], float("nan")))
    importance = torch.rand(2, 2, 20, generator=generator).pow(4).masked_fill(~valid, float("nan"))
    redundancy = (torch.rand(2, 2, 20, generator=generator) - 0.2).masked_fill(~valid, float("nan"))
    return view, importance, redundancy


def slots(view, b, h):
    return [n for n in range(view.shape[2]) if view.valid[b, h, n]]


def directions(view, b, h, members):
    rows = [view.keys[b, h, n].double().tolist() for n in members]
    return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]


def redundancy_of(view, b, h, members):
    """Mean cosine over all pairs."""
    unit = directions(view, b, h, members)
    pairs = [
        sum(x * y for x, y in zip(unit[i], unit[j], strict=True))
        for i in range(len(unit))
        for j in range(len(unit))
        if i != j
    ]
    return max(statistics.fmean(pairs), 0.0) if pairs else 0.0


def stretched(values, counted, attention):
    """Min-max over `counted`, times what brings their mean to the mean of the attention."""
    low, high = min(values[n] for n in counted), max(values[n] for n in counted)
    if high == low:
        return dict.fromkeys(values, 0.0)
    unit = {n: (x - low) / (high - low) for n, x in values.items()}
    factor = statistics.fmean(attention[n] for n in counted) / statistics.fmean(unit[n] for n in counted)
    return {n: x * factor for n, x in unit.items()}


@pytest.mark.parametrize("by_modality", [False, True])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("intrinsic", ["value_norm", "none"])
def test_head_adaptive(make_view, by_modality, window, intrinsic):
    view, importance, redundancy = drawn(make_view)
    mixer = make(
        "mixer", "head_adaptive", intrinsic=make("importance", intrinsic), window=window, by_modality=by_modality
    )
    got = mixer.mix(importance, redundancy, view)
    weights = []
    for b in range(2):
        for h in range(2):
            everyone = slots(view, b, h)
            old = everyone[: len(everyone) - window]
            groups = [everyone]
            if by_modality:
                groups = [[n for n in everyone if bool(view.extras["modality"][b, h, n]) == kind] for kind in (0, 1)]
            for members in groups:
                counted = [n for n in members if n in old]
                r = redundancy_of(view, b, h, members)
                weights.append(r)
                attention = {n: importance[b, h, n].item() for n in members}
                norm = {n: view.values[b, h, n].double().norm().item() for n in members}
                norm = stretched(norm, counted, attention) if intrinsic == "value_norm" else dict.fromkeys(members, 0.0)
                diverse = stretched({n: -redundancy[b, h, n].item() for n in members}, counted, attention)
                for n in members:
                    expected = (1 - r) * (attention[n] + norm[n]) + r * diverse[n]
                    assert got[b, h, n].item() == pytest.approx(expected, rel=1e-4, abs=1e-6), (b, h, n)
    assert max(weights) > 0.2
    assert min(weights) < 0.1


def test_diversity_has_the_mean_of_the_attention(make_view):
    """Keys that all point the same way: the weight is 1, and diversity is left, at the scale of the attention."""
    view, importance, redundancy = drawn(make_view)
    keys = torch.where(view.valid[..., None], torch.ones(8), float("nan"))
    got = make("mixer", "head_adaptive").mix(importance, redundancy, replace(view, keys=keys))
    for b in range(2):
        for h in range(2):
            held = view.valid[b, h]
            assert got[b, h][held].mean().item() == pytest.approx(importance[b, h][held].mean().item(), rel=1e-4)
            assert got[b, h][held].argsort().tolist() == redundancy[b, h][held].argsort(descending=True).tolist()


def test_modality_matters_only_when_asked(make_view):
    view, importance, redundancy = drawn(make_view)
    plain = make("mixer", "head_adaptive")
    apart = make("mixer", "head_adaptive", by_modality=True)
    blind = replace(view, extras={})
    assert torch.equal(plain.mix(importance, redundancy, view), plain.mix(importance, redundancy, blind))
    assert not torch.allclose(
        plain.mix(importance, redundancy, view)[view.valid], apart.mix(importance, redundancy, view)[view.valid]
    )
    all_text = replace(view, extras={"modality": torch.zeros_like(view.valid)})
    torch.testing.assert_close(
        plain.mix(importance, redundancy, view)[view.valid], apart.mix(importance, redundancy, all_text)[view.valid]
    )
    with pytest.raises(UnsupportedError, match="by_modality"):
        apart.mix(importance, redundancy, blind)


@pytest.mark.parametrize(("kind", "name"), [("mixer", "head_adaptive"), ("redundancy", "mean_key")])
def test_modality_is_needed_only_when_asked(kind, name):
    assert make(kind, name).needs == frozenset()
    assert make(kind, name, by_modality=True).needs == {"modality"}
    spec = kvpolicy.load("mixkv")
    assert "modality" not in spec.build().needs
    assert "modality" in spec.replace("mixer.by_modality", True).build().needs
    assert "modality" in spec.replace("redundancy.by_modality", True).build().needs


@pytest.mark.parametrize("by_modality", [False, True])
@pytest.mark.parametrize("unit_mean", [False, True])
def test_mean_key(make_view, by_modality, unit_mean):
    view, _, _ = drawn(make_view, seed=4)
    got = make("redundancy", "mean_key", by_modality=by_modality, unit_mean=unit_mean).score(view)
    assert (got[~view.valid] == 0).all()
    for b in range(2):
        for h in range(2):
            everyone = slots(view, b, h)
            groups = [everyone]
            if by_modality:
                groups = [[n for n in everyone if bool(view.extras["modality"][b, h, n]) == kind] for kind in (0, 1)]
            for members in groups:
                unit = directions(view, b, h, members)
                mean = [statistics.fmean(column) for column in zip(*unit, strict=True)]
                length = math.sqrt(sum(x * x for x in mean)) if unit_mean else 1.0
                for n, row in zip(members, unit, strict=True):
                    expected = sum(x * y for x, y in zip(row, mean, strict=True)) / length
                    assert got[b, h, n].item() == pytest.approx(expected, abs=1e-6)


def normalised(name, scores):
    if name == "max_normalised":
        return [s / max(map(abs, scores)) for s in scores]
    if name == "z_score":
        return [(s - statistics.fmean(scores)) / statistics.pstdev(scores) for s in scores]
    return [(sum(t < s for t in scores) + (sum(t == s for t in scores) - 1) / 2) / (len(scores) - 1) for s in scores]


@pytest.mark.parametrize("name", ["max_normalised", "z_score", "rank"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_normalising_mixers(make_view, name, weight):
    view, importance, redundancy = drawn(make_view, seed=5)
    importance[0, 0, 3] = importance[0, 0, 9]
    got = make("mixer", name, weight=weight).mix(importance * 40 - 3, redundancy / 7, view)
    for b in range(2):
        for h in range(2):
            held = slots(view, b, h)
            first = normalised(name, [importance[b, h, n].double().item() * 40 - 3 for n in held])
            second = normalised(name, [redundancy[b, h, n].double().item() / 7 for n in held])
            for n, i, r in zip(held, first, second, strict=True):
                assert got[b, h, n].item() == pytest.approx(weight * i - (1 - weight) * r, abs=2e-5)


@pytest.mark.parametrize("name", ["max_normalised", "z_score", "rank", "head_adaptive"])
def test_no_mixer_is_comparable_across_heads(name):
    """Each head is normalised by itself, so that an allocator must not pool the result."""
    assert not make("mixer", name).keeps_comparability
    with pytest.raises(kvpolicy.SpecError, match="incomparable"):
        kvpolicy.PolicySpec(
            policy="test", budget=16, trigger={"every": 8}, importance="random", mixer=name, allocator="global_pool"
        )


def test_mixkv_file_is_the_formula(make_view):
    """The shipped composition, from keys, values and queries to the mixed score."""
    generator = torch.Generator().manual_seed(6)
    queries = 2 * torch.randn(2, 2, 3, 4, 8, generator=generator)
    view, _, _ = drawn(make_view, seed=6, queries=queries)
    last = torch.tensor([17, 20])
    at = torch.stack([torch.arange(n - 4, n, dtype=torch.int32) for n in last.tolist()])
    view = replace(view, query_positions=at, seen=last)
    spec = kvpolicy.load("mixkv").replace({"mixer.window": 4, "importance.observe": 4})
    got = spec.build().retention(view)
    for b in range(2):
        for h in range(2):
            everyone = slots(view, b, h)
            old = [n for n in everyone if n < last[b] - 4]
            attention = average_of_five(snapkv(view, b, h, everyone, last[b].item()), old)
            norm = stretched({n: view.values[b, h, n].double().norm().item() for n in old}, old, attention)
            unit = directions(view, b, h, everyone)
            mean = [statistics.fmean(column) for column in zip(*unit, strict=True)]
            away = {n: -sum(x * y for x, y in zip(u, mean, strict=True)) for n, u in zip(everyone, unit, strict=True)}
            diverse = stretched({n: away[n] for n in old}, old, attention)
            r = redundancy_of(view, b, h, everyone)
            for n in old:
                expected = (1 - r) * (attention[n] + norm[n]) + r * diverse[n]
                assert got[b, h, n].item() == pytest.approx(expected, rel=2e-4, abs=1e-6)


def snapkv(view, b, h, everyone, last):
    """Mean over the window and the group of the weights over the whole row."""
    total = dict.fromkeys(everyone, 0.0)
    for q in range(4):
        position = last - 4 + q
        for g in range(3):
            query = view.queries[b, h, g, q].double()
            seen = [n for n in everyone if n <= position]
            exps = {n: math.exp(float(query @ view.keys[b, h, n].double()) * view.scale) for n in seen}
            for n in seen:
                total[n] += exps[n] / sum(exps.values()) / 12
    return total


def average_of_five(scores, old):
    """The mean over five neighbours, zeros beyond the ends."""
    line = [scores[n] for n in old]
    return {n: sum(line[max(i - 2, 0) : i + 3]) / 5 for i, n in enumerate(old)}


def test_rkv_with_the_mixer_of_mixkv(make_view):
    """The composition no paper has: rkv's scores, weighed by the redundancy of each head."""
    queries = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    whole = make_view(queries=queries, seed=9)
    adaptive, rkv = kvpolicy.load("rkv-head-adaptive").build(), kvpolicy.load("rkv").build()
    assert (adaptive.importance, adaptive.redundancy, adaptive.trigger) == (rkv.importance, rkv.redundancy, rkv.trigger)
    importance, redundancy = rkv.importance.score(whole), rkv.redundancy.score(whole)
    got = adaptive.retention(whole)
    for b in range(2):
        for h in range(2):
            everyone, old = range(20), range(12)
            r = redundancy_of(whole, b, h, everyone)
            attention = {n: importance[b, h, n].item() for n in everyone}
            diverse = stretched({n: -redundancy[b, h, n].item() for n in everyone}, old, attention)
            for n in old:
                expected = (1 - r) * attention[n] + r * diverse[n]
                assert got[b, h, n].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


# -- Blocks by attention, then by diversity ---------------------------------------------------------------------------


@pytest.mark.parametrize("mass", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize(("size", "sinks", "recent"), [(4, 0, 0), (3, 2, 5), (1, 0, 3), (50, 0, 0), (4, 50, 0)])
def test_attention_mass(make_view, mass, size, sinks, recent):
    view, importance, _ = drawn(make_view, queries=torch.zeros(2, 2, 1, 1, 8))
    mixer = make("mixer", "attention_mass", mass=mass, size=size, sinks=sinks, recent=recent)
    got = mixer.mix(importance, torch.zeros_like(importance), view)
    for b, h, held, head in heads_of(view):
        wanted = attention_mass(mixer, importance[b, h, held].double(), importance[b, h, held] * 0, head)
        torch.testing.assert_close(got[b, h, held].double(), wanted, rtol=1e-4, atol=1e-4)


def test_attention_mass_keeps_the_unlike_block(make_view):
    """Block 0 has the attention; of the others the one whose keys point elsewhere is worth most."""
    keys = torch.eye(8)[[0, 1, 2, 2, 2, 2, 3, 4]].expand(1, 1, 8, 8)
    importance = torch.tensor([[[5.0, 5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]]])
    mixed = make("mixer", "attention_mass", mass=0.8, size=2).mix(importance, importance * 0, make_view(keys))
    assert mixed[0, 0].tolist() == [3.0, 3.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert not make("mixer", "attention_mass").uses_redundancy
