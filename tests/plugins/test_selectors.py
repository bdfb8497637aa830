"""Selectors against plain Python: chunks, quotas, thresholds and lots."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch

import kvpolicy
from kvpolicy import ops
from kvpolicy.contracts.components import Slots


def make(name, **params):
    return kvpolicy.catalog().get("selector", name)(**params)


def draw(seed, shape=(2, 3, 40), *, holes=0.25, protected=0.1, grid=8):
    """Scores with ties, masks with holes, increasing positions with gaps, and counts between the bounds."""
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(shape, generator=generator) * grid).round() / grid
    valid = torch.rand(shape, generator=generator) > holes
    stays = valid & (torch.rand(shape, generator=generator) < protected)
    positions = torch.randint(1, 4, shape, generator=generator).cumsum(-1).to(torch.int32)
    least, most = stays.sum(-1), valid.sum(-1)
    counts = least + (torch.rand(least.shape, generator=generator) * (most - least + 1)).long()
    seen = positions.amax((1, 2)).to(torch.int64) + 1
    slots = Slots(
        positions=torch.where(valid, positions, -(2**31)),
        prompt_length=(seen * torch.rand(shape[0], generator=generator)).long(),
        seen=seen,
        compaction=torch.randint(0, 9, shape[:1], generator=generator),
        layer_idx=seed % 7,
    )
    return scores.masked_fill(~valid, float("nan")), counts, stays, valid, slots


def heads(case, kept):
    """Yield, for each head: its entries as (slot, score, position), the protected slots, its count, what is kept."""
    scores, counts, stays, valid, slots = case
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            entries = [
                (n, float(scores[b, h, n]), int(slots.positions[b, h, n]))
                for n in valid[b, h].nonzero()[:, 0].tolist()
                if not stays[b, h, n]
            ]
            got = kept.indices[b, h, : kept.lengths[b, h]].tolist()
            assert got == sorted(set(got))
            held = stays[b, h].nonzero()[:, 0].tolist()
            assert set(held) <= set(got)
            assert valid[b, h, got].all()
            yield b, entries, int(counts[b, h]) - len(held), sorted(set(got) - set(held))


def grouped(entries, key):
    groups = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    return groups


def best(entries, count):
    return [n for n, _, _ in sorted(entries, key=lambda e: (-e[1], e[0]))[:count]]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", [1, 5, 20, 1000])
def test_chunks(seed, size):
    case = draw(seed)
    kept = make("chunks", size=size).select(*case)
    assert torch.equal(kept.lengths, case[1])
    for _, entries, room, got in heads(case, kept):
        chunks = grouped(entries, lambda e: e[2] // size)
        # Scores lie on a grid of eighths, so the mean is exact.
        ranked = sorted(chunks, key=lambda c: (-Fraction(sum(int(8 * e[1]) for e in chunks[c]), len(chunks[c])), c))
        expected = []
        for c in ranked:
            expected += best(chunks[c], room - len(expected))
        assert got == sorted(expected)


def test_a_chunk_stays_whole_although_another_has_the_best_entry():
    scores = torch.tensor([[[9.0, 0, 0, 0, 3, 3, 3, 3, 1, 1, 1, 1]]])
    whole, none = torch.ones(1, 1, 12) > 0, torch.zeros(1, 1, 12) > 0
    at = Slots(torch.arange(12).int().view(1, 1, 12), *[torch.tensor([12])] * 3, layer_idx=0)
    for count, expected in [(4, [4, 5, 6, 7]), (6, [0, 1, 4, 5, 6, 7]), (9, [*range(9)])]:
        assert (
            make("chunks", size=4).select(scores, torch.tensor([[count]]), none, whole, at).indices[0, 0].tolist()
            == expected
        )


def by_largest_remainder(weights, total, sizes):
    """Quotas in fractions; what a region cannot hold goes to the others in proportion."""
    open_regions = {r for r in weights if sizes[r]}
    fixed = dict.fromkeys(weights, 0)
    shares = {}
    while open_regions:
        rest = total - sum(fixed.values())
        all_of_it = sum(weights[r] for r in open_regions)
        scaled = {
            r: (weights[r] / all_of_it if all_of_it else Fraction(1, len(open_regions))) * rest for r in open_regions
        }
        full = {r for r in open_regions if scaled[r] > sizes[r]}
        if not full:
            shares = scaled
            break
        fixed |= {r: sizes[r] for r in full}
        open_regions -= full
    quota = fixed | {r: math.floor(x) for r, x in shares.items()}
    order = sorted(shares, key=lambda r: (-(shares[r] - math.floor(shares[r])), r))
    for r in order[: total - sum(quota.values())]:
        quota[r] += 1
    return quota


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("size", [7, 16, 1000])
def test_per_chunk_quota(seed, size):
    case = draw(seed)
    kept = make("per_chunk_quota", size=size).select(*case)
    assert torch.equal(kept.lengths, case[1])
    for _, entries, room, got in heads(case, kept):
        chunks = grouped(entries, lambda e: e[2] // size)
        sizes = {c: len(e) for c, e in chunks.items()}
        quota = by_largest_remainder({c: Fraction(n) for c, n in sizes.items()}, room, sizes)
        assert sum(quota.values()) == room
        assert got == sorted(n for c in chunks for n in best(chunks[c], quota[c]))


def region_of(entry, *, first, span, regions):
    return 0 if entry[2] < first else 1 + (entry[2] - first) * regions // span


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("regions", "prompt", "floor"), [(1, True, 0.5), (4, True, 0.5), (5, False, 0.0), (3, True, 1.0)]
)
def test_region_quota(seed, regions, prompt, floor):
    case = draw(seed, protected=0.05)
    slots = case[4]
    kept = make("region_quota", regions=regions, prompt=prompt, floor=floor).select(*case)
    assert torch.equal(kept.lengths, case[1])
    for b, entries, room, got in heads(case, kept):
        first = int(slots.prompt_length[b]) if prompt else 0
        span = int(slots.seen[b]) - first
        spans = grouped(entries, partial(region_of, first=first, span=span, regions=regions))
        lowest = min((e[1] for e in entries), default=0.0)
        mass = {r: Fraction(sum(e[1] - lowest for e in group)) for r, group in spans.items()}
        sizes = {r: len(group) for r, group in spans.items()}
        every, part = sum(mass.values()), Fraction(floor)
        weights = {
            r: part * Fraction(sizes[r], len(entries))
            + (1 - part) * (mass[r] / every if every else Fraction(sizes[r], len(entries)))
            for r in spans
        }
        quota = by_largest_remainder(weights, room, sizes)
        assert got == sorted(n for r in spans for n in best(spans[r], quota[r]))


def test_no_region_is_wiped_out():
    """All high scores lie in one part: `top_k` keeps nothing else, a quota keeps the others' floor."""
    scores = torch.cat([torch.zeros(1, 1, 60), torch.ones(1, 1, 20)], -1)
    mask, none = torch.ones(1, 1, 80) > 0, torch.zeros(1, 1, 80) > 0
    at = Slots(torch.arange(80).int().view(1, 1, 80), torch.tensor([20]), torch.tensor([80]), torch.tensor([0]), 0)
    rest = (torch.tensor([[20]]), none, mask, at)
    assert make("top_k").select(scores, *rest).indices[0, 0].tolist() == [*range(60, 80)]
    kept = make("region_quota", regions=3, floor=0.5).select(scores, *rest).indices[0, 0]
    assert Counter((kept // 20).tolist()) == {0: 3, 1: 3, 2: 2, 3: 12}  # 2.5, 2.5, 2.5 and 2.5 + 10


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("value", "relative_to"), [(0.5, "none"), (0.0, "none"), (0.75, "mean"), (0.25, "max")])
def test_threshold(seed, value, relative_to):
    case = draw(seed)
    case = (case[0].abs(), *case[1:])
    threshold = make("threshold", value=value, relative_to=relative_to)
    assert not threshold.exact
    kept = threshold.select(*case)
    for _, entries, room, got in heads(case, kept):
        scores = [e[1] for e in entries]
        unit = {"none": 1.0, "mean": sum(scores) / max(1, len(scores)), "max": max(scores, default=0.0)}[relative_to]
        assert got == sorted(best([e for e in entries if e[1] >= value * unit], room))


def test_a_policy_with_a_threshold_has_its_own_counts_per_head(make_view):
    policy = (
        kvpolicy.load("threshold").replace({"budget.tokens": 40, "protect.recent": 8, "selector.value": 1.0}).build()
    )
    assert policy.counts == "per_head"
    queries = torch.randn(2, 2, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    view = make_view(shape=(2, 2, 60, 8), queries=queries)
    (kept,) = policy.select([view], [40, 40])
    assert (kept.lengths <= 40).all()
    assert len(set(kept.lengths.flatten().tolist())) > 1


def drawn(sampled, counts, *, scores=(3.0, 2.0, 1.0, 0.0), trials=20_000, **params):
    """How often each entry of a row is kept over many compactions of it."""
    n = len(scores)
    shape = (trials, 1, n)
    at = Slots(
        torch.arange(n).int().expand(shape),
        *[torch.full((trials,), n)] * 2,
        compaction=torch.arange(trials),
        layer_idx=0,
    )
    kept = make("stochastic", sampled=sampled, **params).select(
        torch.tensor(scores).expand(shape),
        torch.full((trials, 1), counts),
        torch.zeros(shape, dtype=torch.bool),
        torch.ones(shape, dtype=torch.bool),
        at,
    )
    return kept.mask(n)[:, 0].double().mean(0)


def without_replacement(scores, count):
    """Exact probability that each entry is among `count` draws in proportion to exp(score)."""
    weights = [math.exp(s) for s in scores]
    found = [0.0] * len(scores)

    def follow(left, chosen, probability):
        if len(chosen) == count:
            for i in chosen:
                found[i] += probability
            return
        for i in left:
            follow(left - {i}, chosen | {i}, probability * weights[i] / sum(weights[j] for j in left))

    follow(frozenset(range(len(scores))), frozenset(), 1.0)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_lots_follow_the_softmax(temperature):
    """20,000 compactions: three standard deviations are 0.0107."""
    scores = (3.0, 2.0, 1.0, 0.0)
    exact = without_replacement([s / temperature for s in scores], 2)
    assert (drawn(1.0, 2, temperature=temperature) - exact).abs().max() < 0.011
    # Half of two by score, the other by lot among the three that are left.
    exact = torch.cat([torch.ones(1).double(), without_replacement([s / temperature for s in scores[1:]], 1)])
    assert (drawn(0.5, 2, temperature=temperature) - exact).abs().max() < 0.011


@pytest.mark.parametrize("seed", range(6))
def test_stochastic_keeps_the_best_and_exactly_the_count(seed):
    case = draw(seed)
    stochastic = make("stochastic", sampled=0.4, seed=5)
    kept = stochastic.select(*case)
    assert torch.equal(kept.lengths, case[1])
    for _, entries, room, got in heads(case, kept):
        certain = room - math.floor(room * 0.4)
        assert set(best(entries, certain)) <= set(got)
    again = stochastic.select(*case)
    assert torch.equal(kept.indices, again.indices)
    scores, counts, stays, valid, slots = case
    other = make("stochastic", sampled=0.4, seed=6).select(*case)
    later = stochastic.select(scores, counts, stays, valid, replace(slots, compaction=slots.compaction + 1))
    for changed in (other, later):
        assert not torch.equal(kept.mask(40), changed.mask(40))
    assert torch.equal(make("stochastic", sampled=0.0).select(*case).indices, ops.top_k(*case[:4]).indices)


def test_heads_draw_their_own_lots_unless_they_share_a_set():
    scores, counts, _, _, slots = draw(1, holes=0)
    alike = (torch.zeros_like(scores), torch.full_like(counts, 20), torch.zeros(2, 3, 40) > 0, torch.ones(2, 3, 40) > 0)
    slots = replace(slots, positions=torch.arange(40).int().expand(2, 3, 40))
    for scope, shared in (("head", False), ("layer", True), ("model", True)):
        kept = make("stochastic", sampled=1.0, scope=scope).select(*alike, slots).indices
        assert torch.equal(kept[:, 0], kept[:, 1]) == shared
        assert not torch.equal(kept[0], kept[1])


def test_lots_in_proportion_to_the_scores():
    """20,000 compactions: three standard deviations are 0.0107; what scores nothing comes last."""
    plain = (5.0, 3.0, 1.0, 1.0)
    got = drawn(1.0, 2, scores=plain, in_proportion=True)
    assert (got - without_replacement([math.log(x) for x in plain], 2)).abs().max() < 0.0107
    got = drawn(1.0, 2, scores=(5.0, 0.0, 1.0, -1.0), in_proportion=True)
    assert got.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert drawn(1.0, 1, scores=(0.0, 0.0, 0.0), in_proportion=True).tolist() == [1.0, 0.0, 0.0]


ANCHORS = {"alternate": lambda o, e: o % 2, "zeros": lambda o, e: 0, "ones": lambda o, e: 1}


def bits_of(entries):
    upper = best(entries, len(entries) // 2)
    return {n: int(n in upper) for n, _, _ in entries}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("anchor", ["alternate", "mean", "zeros", "ones"])
@pytest.mark.parametrize(("size", "share"), [(4, 0.25), (5, 0.8), (1, 0.5), (16, 1.0), (7, 0.0)])
def test_representatives(seed, anchor, size, share):
    case = draw(seed)
    kept = make("representatives", size=size, share=share, anchor=anchor).select(*case)
    assert torch.equal(kept.lengths, case[1])
    for _, entries, room, got in heads(case, kept):
        standing = math.floor(room * share)
        blocks, bits = grouped(entries, lambda e: e[2] // size), bits_of(entries)
        ranked = sorted(blocks, key=lambda c: (-Fraction(sum(int(8 * e[1]) for e in blocks[c]), len(blocks[c])), c))
        important = [n for c in ranked for n in best(blocks[c], size)][: room - standing]
        wanted_bit = {}
        for _, _, position in entries:
            same = [bits[n] for n, _, p in entries if p % size == position % size]
            mean = int(2 * sum(same) > len(same))
            wanted_bit[position % size] = mean if anchor == "mean" else ANCHORS[anchor](position % size, entries)
        far = {c: sum(bits[n] != wanted_bit[p % size] for n, _, p in members) for c, members in blocks.items()}
        left = grouped([e for e in entries if e[0] not in important], lambda e: e[2] // size)
        line = sorted(left, key=lambda c: (far[c], c))
        number = math.ceil(standing / size)
        turns = [math.ceil(Fraction(i * len(line), number)) for i in range(number)]
        order = [c for t, c in enumerate(line) if t in turns] + [c for t, c in enumerate(line) if t not in turns]
        others = [n for c in order for n in best(left[c], size)][:standing]
        assert got == sorted(important + others)


def test_representatives_are_of_every_sort():
    """Six blocks of two bits, from like the anchor to unlike it: of three that stay one is near, one far."""
    scores = torch.tensor([[[0.0, 9, 0, 8, 7, 6, 1, 1, 5, 0, 4, 0]]])
    whole, none = torch.ones(1, 1, 12) > 0, torch.zeros(1, 1, 12) > 0
    at = Slots(torch.arange(12).int().view(1, 1, 12), *[torch.tensor([12])] * 3, layer_idx=0)
    kept = make("representatives", size=2, share=1.0).select(scores, torch.tensor([[6]]), none, whole, at)
    assert kept.indices[0, 0].tolist() == [0, 1, 4, 5, 8, 9]


@pytest.mark.parametrize(
    "name", ["chunks", "per_chunk_quota", "region_quota", "representatives", "stochastic", "threshold"]
)
def test_scope_layer_shares_one_set(make_view, name):
    spec = kvpolicy.load("snapkv").replace({"budget.tokens": 24, "selector": {"use": name, "scope": "layer"}})
    policy = spec.build()
    queries = torch.randn(2, 2, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    view = make_view(shape=(2, 2, 60, 8), queries=queries)
    (kept,) = policy.select([view], [24, 24])
    assert torch.equal(kept.indices[:, 0], kept.indices[:, 1])
    assert (kept.lengths == 24).all() or name == "threshold"
