"""Kernel density of keys against its definition in loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvpolicy import ops


def by_definition(keys, valid, bandwidth, priority=None, lower=1.0):
    """In float64; of equal priorities the later slot comes first."""
    result = torch.zeros(valid.shape, dtype=torch.float64)
    for b, h in torch.cartesian_prod(*map(torch.arange, valid.shape[:2])).tolist():
        held = valid[b, h].nonzero()[:, 0].tolist()
        unit = {i: keys[b, h, i].double() / max(float(keys[b, h, i].double().norm()), 1e-15) for i in held}
        rank = {i: (0.0 if priority is None else float(priority[b, h, i]), i) for i in held}
        for i in held:
            weight = {j: 1.0 if rank[j] > rank[i] else lower for j in held if j != i}
            near = [w * math.exp((float(unit[i] @ unit[j]) - 1) / bandwidth) for j, w in weight.items()]
            result[b, h, i] = math.fsum(near) / len(held)
    return result


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 129, 200])
@pytest.mark.parametrize("bandwidth", [0.05, 0.2, 3.0])
def test_equals_the_definition_and_reads_no_other_slot(count, bandwidth):
    generator = torch.Generator().manual_seed(count)
    keys = torch.randn(2, 3, count, 8, generator=generator) + 1
    valid = torch.rand(2, 3, count, generator=generator) < 0.8
    valid[0, 0], valid[1, 2] = True, False
    got = ops.key_density(torch.where(valid[..., None], keys, float("nan")), valid, bandwidth=bandwidth)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), by_definition(keys, valid, bandwidth), rtol=1e-5, atol=1e-6)
    assert (got[~valid] == 0).all()


@pytest.mark.parametrize("ordered", [False, True])
def test_where_nothing_is_left_out_keys_are_read_in_place_and_left_alone(ordered):
    generator = torch.Generator().manual_seed(0)
    keys, valid = torch.randn(2, 2, 90, 8, generator=generator) + 1, torch.ones(2, 2, 90, dtype=torch.bool)
    before, priority = keys.clone(), torch.rand(2, 2, 90, generator=generator) if ordered else None
    got = ops.key_density(keys, valid, bandwidth=0.2, priority=priority, lower=0.3 if ordered else 1.0)
    expected = by_definition(keys, valid, 0.2, priority, 0.3 if ordered else 1.0)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(keys, before)


@pytest.mark.parametrize("count", [1, 2, 64, 65, 200])
@pytest.mark.parametrize("lower", [0.0, 0.3, 1.0])
def test_keys_of_higher_priority_count_whole(count, lower):
    generator = torch.Generator().manual_seed(count)
    keys = torch.randn(2, 3, count, 8, generator=generator) + 1
    valid = torch.rand(2, 3, count, generator=generator) < 0.8
    valid[0, 0], valid[1, 2] = True, False
    priority = torch.randint(-5, 5, valid.shape, generator=generator).float()  # many are equal
    got = ops.key_density(
        torch.where(valid[..., None], keys, float("nan")),
        valid,
        bandwidth=0.2,
        priority=priority.masked_fill(~valid, float("nan")),
        lower=lower,
    )
    expected = by_definition(keys, valid, 0.2, priority, lower)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert (got[~valid] == 0).all()


def test_by_hand_with_priorities():
    """Three copies: the best one is covered by nothing but a share of the others, the second by the best, and so on."""
    keys = torch.tensor([[1.0, 0.0]]).expand(1, 1, 3, 2)
    everything = torch.ones(1, 1, 3, dtype=torch.bool)
    got = ops.key_density(keys, everything, bandwidth=0.2, priority=torch.tensor([[[5.0, 1.0, 5.0]]]), lower=0.25)
    assert (3 * got[0, 0]).tolist() == pytest.approx([1.25, 2.0, 0.5])


def test_by_hand():
    # Cosines 0.8, 0.6 and 0.96 of a 3-4-5 triangle, and a key of length 0, which has cosine 0 to all.
    keys = torch.tensor([[2.0, 0.0], [0.8, 0.6], [3.0, 4.0], [0.0, 0.0]])[None, None]
    kernel = {cosine: math.exp((cosine - 1) / 0.2) for cosine in (0.8, 0.6, 0.96, 0.0)}
    expected = [
        kernel[0.8] + kernel[0.6] + kernel[0.0],
        kernel[0.8] + kernel[0.96] + kernel[0.0],
        kernel[0.6] + kernel[0.96] + kernel[0.0],
        3 * kernel[0.0],
    ]
    got = ops.key_density(keys, torch.ones(1, 1, 4, dtype=torch.bool), bandwidth=0.2)
    assert got[0, 0].tolist() == pytest.approx([x / 4 for x in expected], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_views_half_precision_and_rows_alone(dtype):
    generator = torch.Generator().manual_seed(3)
    arena = torch.randn(3, 2, 220, 16, generator=generator).to(dtype)
    keys, valid = arena[:, :, 10:210], torch.rand(3, 2, 200, generator=generator) < 0.9
    got = ops.key_density(keys, valid, bandwidth=0.2)
    torch.testing.assert_close(got, ops.key_density(keys.float().contiguous(), valid, bandwidth=0.2), rtol=0, atol=0)
    for b in range(3):
        alone = ops.key_density(keys[b : b + 1], valid[b : b + 1], bandwidth=0.2)
        torch.testing.assert_close(got[b : b + 1], alone, rtol=1e-6, atol=1e-7)


def test_half_precision_is_upcast_before_it_is_squared():
    keys = torch.full((1, 1, 5, 64), 60000.0, dtype=torch.float16)
    keys[..., 4, :] = 1e-6
    got = ops.key_density(keys, torch.ones(1, 1, 5, dtype=torch.bool), bandwidth=0.2)
    assert got[0, 0].tolist() == pytest.approx([0.8] * 5, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 40])
def test_heads_in_several_tiles_and_padding_do_not_meet(rows):
    generator = torch.Generator().manual_seed(4)
    keys, valid = torch.randn(rows, 2, 150, 8, generator=generator), torch.ones(rows, 2, 150, dtype=torch.bool)
    valid[-1, :, :70] = False
    got = ops.key_density(keys, valid, bandwidth=0.2)
    alone = ops.key_density(keys[-1:, :, 70:], valid[-1:, :, 70:], bandwidth=0.2)
    torch.testing.assert_close(got[-1:, :, 70:], alone, rtol=1e-5, atol=1e-7)
    swapped = ops.key_density(keys.flip(0, 1), valid.flip(0, 1), bandwidth=0.2).flip(0, 1)
    torch.testing.assert_close(swapped, got, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bandwidth", [1e-3, 1e-9, 1e-300])
def test_rounded_cosines_of_twins_do_not_explode(bandwidth):
    keys = torch.randn(1, 1, 1, 61, generator=torch.Generator().manual_seed(5)) * torch.arange(1, 100).reshape(
        1, 1, -1, 1
    )
    got = ops.key_density(keys, torch.ones(1, 1, 99, dtype=torch.bool), bandwidth=bandwidth)
    assert ((got >= 0) & (got <= 98 / 99 + 1e-6)).all()
    if bandwidth == 1e-3:
        torch.testing.assert_close(got, torch.full_like(got, 98 / 99), rtol=1e-3, atol=0)


def test_keys_of_length_0_are_close_to_nothing_and_to_each_other_alike():
    got = ops.key_density(torch.zeros(1, 1, 70, 4), torch.ones(1, 1, 70, dtype=torch.bool), bandwidth=0.5)
    torch.testing.assert_close(got, torch.full_like(got, 69 / 70 * math.exp(-2)))


class _Largest(TorchDispatchMode):
    """Remembers the most numbers that any result held."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and 0 not in result.stride():
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize(("rows", "count"), [(1, 8192), (24, 1152)])
@pytest.mark.parametrize("lower", [1.0, 0.5])
def test_never_keys_times_keys(rows, count, lower):
    keys, valid = torch.randn(rows, 1, count, 16), torch.ones(rows, 1, count, dtype=torch.bool)
    priority = torch.rand(rows, 1, count) if lower < 1 else None
    with _Largest() as largest:
        ops.key_density(keys, valid, bandwidth=0.2, priority=priority, lower=lower)
    assert rows * count * 16 <= largest.numbers <= max(64 * count, rows * count * 16)


def test_nothing_to_score_and_wrong_arguments():
    nothing = ops.key_density(torch.zeros(2, 1, 0, 4), torch.zeros(2, 1, 0, dtype=torch.bool), bandwidth=0.2)
    assert nothing.shape == (2, 1, 0)
    with pytest.raises(ValueError, match=r"bandwidth is 0; give a number above 0\."):
        ops.key_density(torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, dtype=torch.bool), bandwidth=0)
    two = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"lower is 1.5; give a number from 0 to 1\."):
        ops.key_density(*two, bandwidth=0.2, priority=torch.zeros(1, 1, 2), lower=1.5)
    with pytest.raises(ValueError, match=r"lower is 0.5 and there is no priority; give one, or leave lower out\."):
        ops.key_density(*two, bandwidth=0.2, lower=0.5)
    with pytest.raises(ValueError, match=r"priority has shape \[1, 2\]; give \[1, 1, 2\], to fit"):
        ops.key_density(*two, bandwidth=0.2, priority=torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"priority has shape \[1, 2\]; give \[1, 1, 2\], to fit"):
        ops.key_density(*two, bandwidth=0.2, priority=torch.zeros(1, 2), lower=0.5)
    with pytest.raises(ValueError, match=r"valid has shape \[1, 2\]; give \[1, 1, 2\], to fit"):
        ops.key_density(torch.zeros(1, 1, 2, 4), torch.ones(1, 2, dtype=torch.bool), bandwidth=0.2)
