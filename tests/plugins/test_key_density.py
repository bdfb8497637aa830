"""`key_density` on views, against its definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy.contracts.view import Rope
from kvpolicy.errors import UnsupportedError


def make(**params):
    return kvpolicy.catalog().get("redundancy", "key_density")(**params)


def turned(vectors, angles):
    """Turn vectors `[N, 2]` by so many radians each."""
    pair = [
        (x * math.cos(a) - y * math.sin(a), y * math.cos(a) + x * math.sin(a))
        for (x, y), a in zip(vectors, angles, strict=True)
    ]
    return torch.tensor(pair)


def density(keys, bandwidth):
    """The definition, of keys `[n, D]` in float64."""
    unit = [k / k.norm() for k in keys]
    near = [
        [math.exp((float(a @ b) - 1) / bandwidth) for j, b in enumerate(unit) if j != i] for i, a in enumerate(unit)
    ]
    return torch.tensor([math.fsum(row) / len(unit) for row in near], dtype=torch.float64)


def test_a_repetition_is_found_wherever_it_stands(make_view):
    """(1,0), (0,1) and (1,0) again at positions 0, 4 and 9, turned by 0, 0.8 and 1.8 radians when they were cached."""
    plain, at = [(2.0, 0.0), (0.0, 1.0), (0.5, 0.0)], torch.tensor([[[0, 4, 9]]], dtype=torch.int32)
    keys = turned(plain, [0.0, 0.8, 1.8])[None, None]
    view = make_view(keys, positions=at, rope=Rope(torch.tensor([0.2])))
    far = math.exp(-5)
    expected = [(1 + far) / 3, 2 * far / 3, (1 + far) / 3]
    assert make().score(view)[0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    cosines = math.cos(math.pi / 2 + 0.8), math.cos(1.8), math.cos(math.pi / 2 - 1.0)  # of 0 1, 0 2 and 1 2
    kernel = [math.exp((c - 1) / 0.2) for c in cosines]
    cached = [kernel[0] + kernel[1], kernel[0] + kernel[2], kernel[1] + kernel[2]]
    post = make(rope="post").score(view)[0, 0]
    assert post.tolist() == pytest.approx([k / 3 for k in cached], rel=1e-4)


def test_positions_that_keys_were_rerotated_to_count(make_view):
    keys, at = torch.randn(1, 2, 30, 8), torch.arange(30, dtype=torch.int32).expand(1, 2, 30)
    view = make_view(keys, positions=3 * at, rope_positions=at)
    torch.testing.assert_close(make().score(view), make().score(make_view(keys, positions=at)))


@pytest.mark.parametrize("params", [{}, {"rope": "post"}, {"bandwidth": 0.05}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_definition_where_slots_are_valid(make_view, params, dtype):
    generator = torch.Generator().manual_seed(2)
    valid = torch.rand(2, 2, 90, generator=generator) < 0.8
    valid[1, 1] = False
    view = make_view(shape=(2, 2, 90, 8), valid=valid)
    view = replace(view, keys=torch.where(valid[..., None], view.keys + 1, float("nan")).to(dtype))
    got = make(**params).score(view)
    assert got.dtype == torch.float32
    assert (got[~valid] == 0).all()
    half = 4
    for b, h in ((0, 0), (0, 1), (1, 0)):
        keys, at = view.keys[b, h][valid[b, h]].double(), view.positions[b, h][valid[b, h]].double()
        if params.get("rope") != "post":
            angle = at[:, None] * view.rope.inv_freq.double()
            first, second = keys[:, :half], keys[:, half:]
            back = (first * angle.cos() + second * angle.sin(), second * angle.cos() - first * angle.sin())
            keys = torch.cat(back, dim=1)
        expected = density(keys, params.get("bandwidth", 0.2))
        torch.testing.assert_close(got[b, h][valid[b, h]].double(), expected, rtol=1e-4, atol=1e-6)


def test_the_rotation_is_needed_only_to_take_it_off(make_view):
    assert make().needs == {"rope"}
    assert make(rope="post").needs == frozenset()
    view = make_view(rope=None)
    assert make(rope="post").score(view).isfinite().all()
    with pytest.raises(UnsupportedError, match=r"redundancy: key_density with `rope: pre` needs the rotary embedding"):
        make().score(view)
