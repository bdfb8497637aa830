"""Kernel density of keys: the kernel against float64, in order of priority and without."""

from __future__ import annotations

import random

import pytest
import torch

from kvpolicy import ops
from kvpolicy.errors import UnsupportedError
from kvpolicy_kernels import density

NAN = float("nan")


def case(device, dtype, dim, n):
    """Keys in an arena, several of them alike, NaN in free slots; priorities of which many are equal."""
    arena = torch.full((2, 2, 2, n + 5, dim), NAN, dtype=dtype)
    keys = arena[1, :, :, :n]
    some = torch.randn(2, 2, 5, dim)
    keys.copy_(some[:, :, torch.randint(0, 5, (n,))] + 0.4 * torch.randn(2, 2, n, dim))
    valid = torch.rand(2, 2, n) > 0.2
    valid[0, 0], valid[1, 1] = True, False
    keys[~valid] = NAN
    priority = torch.randint(0, 20, (2, 2, n)).float().masked_fill(~valid, NAN)
    arena, valid, priority = (t.to(device) for t in (arena, valid, priority))
    return arena[1, :, :, :n], valid, priority


def reference(keys, valid, bandwidth, priority=None, lower=1.0):
    """In float64; of equal priorities the later slot comes first."""
    plain = torch.where(valid[..., None], keys, 0).double()
    unit = plain / plain.norm(dim=-1, keepdim=True).clamp(min=1e-15)
    near = torch.exp((unit @ unit.transpose(2, 3) - 1) / bandwidth)
    slot = torch.arange(valid.shape[2])
    if priority is not None:
        high, low = priority[:, :, None, :], priority[:, :, :, None]
        before = (high > low) | ((high == low) & (slot[None, :] > slot[:, None]))
        near = torch.where(before, near, lower * near)
    near = near.masked_fill(slot[:, None] == slot[None, :], 0.0).masked_fill(~valid[:, :, None, :], 0.0)
    return (near.sum(-1) / valid.sum(-1, keepdim=True).clamp(min=1)).masked_fill(~valid, 0.0)


def check(inputs, **options):
    keys, valid, priority = inputs
    got = density.key_density(keys, valid, priority=priority, **options).cpu().double()
    lower = options.get("lower", 1.0)
    want = reference(keys.cpu(), valid.cpu(), options["bandwidth"], priority.cpu() if lower < 1 else None, lower)
    error = ((got - want).abs().amax(-1) / want.amax(-1).clamp(min=1e-30)).max()
    assert error < 1e-6, f"relative error {error:.2e}"
    return got


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(("lower", "bandwidth"), [(0.0, 3.0), (0.3, 0.15), (1.0, 0.2)])
def test_in_order_of_priority(lower, bandwidth, device, grid_order):
    check(case(device, torch.float32, 32, random.randint(65, 128)), bandwidth=bandwidth, lower=lower)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.bfloat16, 16), (torch.float16, 32), (torch.bfloat16, 64), (torch.float32, 96), (torch.bfloat16, 128),
     (torch.float16, 192), (torch.float32, 256)],
)  # fmt: skip
def test_dtypes_and_head_dims(dtype, dim, device):
    """fp32 on a GPU too: keys whose rotary embedding is taken off are not rounded again."""
    check(case(device, dtype, dim, 60), bandwidth=0.2, lower=0.5)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("n", [1, 2, 64, 65])
def test_sizes(n, device):
    check(case(device, torch.float16, 16, n), bandwidth=0.2, lower=random.choice([0.3, 1.0]))


@pytest.mark.usefixtures("seed")
def test_twins_in_a_narrow_kernel_do_not_explode(device):
    keys = torch.randn(1, 1, 1, 32) * torch.arange(1, 70).reshape(1, 1, -1, 1)
    valid = torch.ones(1, 1, 69, dtype=torch.bool, device=device)
    got = density.key_density(keys.to(device), valid, bandwidth=1e-9)
    assert ((got >= 0) & (got <= 1)).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, which interprets
@pytest.mark.usefixtures("seed")
def test_a_bad_key_cannot_hide_nor_reach_other_heads(device):
    keys, _, _ = case(device, torch.float16, 16, 70)
    keys = keys.nan_to_num(1.0)
    keys[1, 0, 3] = NAN
    got = density.key_density(keys, torch.ones(2, 2, 70, dtype=torch.bool, device=device), bandwidth=0.2)
    assert not got[1, 0].isfinite().any()
    assert got[0].isfinite().all()
    assert got[1, 1].isfinite().all()


def test_nothing_to_score_and_what_is_refused(device):
    def of(n, dim=16):
        return torch.zeros(2, 1, n, dim, device=device), torch.ones(2, 1, n, dtype=torch.bool, device=device)

    assert density.key_density(*of(0), bandwidth=0.2).shape == (2, 1, 0)
    zero = density.key_density(*of(70), bandwidth=0.5)
    torch.testing.assert_close(zero, ops.key_density(*of(70), bandwidth=0.5))
    with pytest.raises(ValueError, match=r"bandwidth is 0; give a number above 0"):
        density.key_density(*of(3), bandwidth=0)
    with ops.using_backend("triton"), pytest.raises(UnsupportedError, match=r"cannot run key_density.*head dim is 48"):
        ops.key_density(*of(3, 48), bandwidth=0.2)
    across = torch.zeros(2, 1, 16, 20, device=device).transpose(2, 3), of(20)[1]
    with ops.using_backend("triton"), pytest.raises(UnsupportedError, match="head dim must be contiguous"):
        ops.key_density(*across, bandwidth=0.2)
