"""Mean keys and normalisations against the definitions, written out in loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from kvpolicy import ops


def draw(seed=0, shape=(2, 3, 17, 8), shift=1.0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(shape, generator=generator) + shift * torch.randn((*shape[:2], 1, shape[3]), generator=generator)
    valid = torch.rand(shape[:3], generator=generator) < 0.7
    valid[0, 0] = True
    valid[1, 2] = False
    valid[1, 1] = False
    valid[1, 1, 4] = True
    return keys, valid


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)))


def valid_rows(keys, valid, b, h):
    return [keys[b, h, n].double().tolist() for n in range(keys.shape[2]) if valid[b, h, n]]


@pytest.mark.parametrize("shift", [0.0, 1.0, 5.0])
def test_head_redundancy_is_the_mean_cosine_of_all_pairs(shift):
    keys, valid = draw(shift=shift)
    got = ops.head_redundancy(keys.masked_fill(~valid[..., None], float("nan")), valid)
    for b in range(2):
        for h in range(3):
            rows = valid_rows(keys, valid, b, h)
            pairs = [cosine(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
            assert got[b, h].item() == pytest.approx(statistics.fmean(pairs) if pairs else 0.0, abs=2e-6)
    if shift == 5.0:
        assert got[0].min() > 0.5


def test_head_redundancy_of_many_keys_that_point_the_same_way():
    """The closed form subtracts nearly equal numbers; the result must still be right to the last digits."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 1, 4096, 64, generator=generator) + 3 * torch.randn(64, generator=generator)
    unit = torch.nn.functional.normalize(keys[0, 0].double(), dim=-1)
    dense = unit @ unit.T
    expected = (dense.sum() - dense.diagonal().sum()) / (4096 * 4095)
    got = ops.head_redundancy(keys, torch.ones(1, 1, 4096, dtype=torch.bool))
    assert got.item() == pytest.approx(expected.item(), abs=1e-5)


def test_zero_keys_have_no_direction():
    keys = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])[None, None]
    valid = torch.ones(1, 1, 3, dtype=torch.bool)
    assert ops.head_redundancy(keys, valid).item() == pytest.approx(2 / 6)
    assert ops.mean_key_similarity(keys, valid)[0, 0].tolist() == pytest.approx([2 / 3, 0, 2 / 3])


@pytest.mark.parametrize("unit_mean", [False, True])
def test_mean_key_similarity(unit_mean):
    keys, valid = draw(2)
    got = ops.mean_key_similarity(keys.masked_fill(~valid[..., None], float("nan")), valid, unit_mean=unit_mean)
    assert (got[~valid] == 0).all()
    for b in range(2):
        for h in range(3):
            rows = valid_rows(keys, valid, b, h)
            if not rows:
                continue
            units = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]
            mean = [statistics.fmean(column) for column in zip(*units, strict=True)]
            length = math.sqrt(sum(x * x for x in mean)) if unit_mean else 1.0
            expected = [sum(x * y for x, y in zip(unit, mean, strict=True)) / length for unit in units]
            assert got[b, h][valid[b, h]].tolist() == pytest.approx(expected, abs=1e-6)


def test_mean_key_similarity_is_the_mean_cosine_to_all_keys():
    keys, valid = draw(3)
    rows = valid_rows(keys, valid, 0, 0)
    expected = [statistics.fmean(cosine(x, y) for y in rows) for x in rows]
    assert ops.mean_key_similarity(keys, valid)[0, 0].tolist() == pytest.approx(expected, abs=1e-6)


def by_hand(name, scores):
    if name == "by_maximum":
        top = max(map(abs, scores))
        return [s / top if top else 0.0 for s in scores]
    if name == "min_max":
        low, high = min(scores), max(scores)
        return [(s - low) / (high - low) if high > low else 0.0 for s in scores]
    if name == "z_scores":
        mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
        return [(s - mean) / deviation if deviation else 0.0 for s in scores]
    others = max(len(scores) - 1, 1)
    return [(sum(t < s for t in scores) + (sum(t == s for t in scores) - 1) / 2) / others for s in scores]


@pytest.mark.parametrize("name", ["by_maximum", "min_max", "z_scores", "ranks"])
@pytest.mark.parametrize("factor", [1.0, -3.0, 0.0, 1e-20])
def test_normalisations(name, factor):
    generator = torch.Generator().manual_seed(5)
    scores = (torch.randint(-3, 9, (2, 3, 12), generator=generator) / 4) * factor
    _, valid = draw()
    valid = valid[..., :12]
    got = getattr(ops, name)(scores.masked_fill(~valid, float("nan")) if name != "min_max" else scores, valid)
    if name != "min_max":
        assert (got[~valid] == 0).all()
    for b in range(2):
        for h in range(3):
            inside = scores[b, h][valid[b, h]].double().tolist()
            if inside:
                expected = by_hand(name, inside)
                assert got[b, h][valid[b, h]].tolist() == pytest.approx(expected, abs=1e-5), (b, h)


def test_equal_scores_have_no_deviation():
    """The mean of equal numbers is not that number in floating point; the difference must not become a score."""
    scores = torch.full((1, 1, 1000), 0.1)
    assert (ops.z_scores(scores, torch.ones(1, 1, 1000, dtype=torch.bool)) == 0).all()


def test_mean_matched():
    scores = torch.tensor([[[1.0, 3.0, 2.0, float("nan"), 5.0]]])
    like = torch.tensor([[[4.0, -2.0, 3.0, float("nan"), 7.0]]])
    mask = torch.tensor([[[True, True, True, False, False]]])
    got = ops.mean_matched(scores, mask, like)[0, 0]
    assert got[:3].tolist() == pytest.approx([0.0, 6.0, 3.0])  # min-max 0, 1, 1/2 with mean 1/2; mean magnitude 3
    assert got[4].item() == pytest.approx(12.0)  # outside: the same line, further on
    flat = ops.mean_matched(torch.ones(1, 1, 5), mask, like)
    assert (flat == 0).all()


def test_projected_value_norm():
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(2, 3, 9, 4, generator=generator)
    projection = torch.randn(3, 2, 4, 5, generator=generator)
    valid = torch.rand(2, 3, 9, generator=generator) < 0.8
    got = ops.projected_value_norm(values.masked_fill(~valid[..., None], float("inf")), projection, valid)
    for b in range(2):
        for h in range(3):
            for n in range(9):
                heads = [values[b, h, n].double() @ projection[h, g].double() for g in range(2)]
                expected = statistics.fmean(float(out.abs().sum()) for out in heads) if valid[b, h, n] else 0.0
                assert got[b, h, n].item() == pytest.approx(expected, rel=1e-5)
