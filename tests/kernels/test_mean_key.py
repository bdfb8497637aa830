"""Similarity to the mean key, against float64."""

from __future__ import annotations

import random

import pytest
import torch

from kvpolicy import ops
from kvpolicy_kernels import launching, similarity

NAN = float("nan")


def case(device, dtype, dim, n):
    """Keys of an arena, not contiguous, with a zero key, an empty head, and NaN wherever no key takes part."""
    arena = torch.full((2, 3, n + 7, dim), NAN, dtype=dtype)
    keys = arena[:, :, :n]
    keys.copy_(torch.randn(2, 3, 1, dim) + torch.randn(2, 3, n, dim))
    valid = torch.rand(2, 3, n) > 0.2
    valid[1, 0] = False
    if n > 1:
        keys[0, 0, 1] = 0.0
        valid[0, 0, 1] = True
    keys[~valid] = NAN
    return arena.to(device)[:, :, :n], valid.to(device)


def reference(keys, valid, unit_mean):
    out = torch.zeros(valid.shape, dtype=torch.float64)
    for b in range(valid.shape[0]):
        for h in range(valid.shape[1]):
            held = keys[b, h, valid[b, h]].double()
            if len(held) == 0:
                continue
            unit = held / held.norm(dim=-1, keepdim=True).clamp(min=1e-15)
            mean = unit.mean(0)
            out[b, h, valid[b, h]] = unit @ (mean / mean.norm().clamp(min=1e-12) if unit_mean else mean)
    return out


def check(keys, valid, unit_mean):
    got = similarity.mean_key_similarity(keys, valid, unit_mean=unit_mean)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu().double(), reference(keys.cpu(), valid.cpu(), unit_mean), atol=1e-6, rtol=0)
    assert torch.equal(got, similarity.mean_key_similarity(keys, valid, unit_mean=unit_mean))
    with ops.using_backend("triton"):
        assert torch.equal(got, ops.mean_key_similarity(keys, valid, unit_mean=unit_mean))


@pytest.mark.usefixtures("seed", "grid_order")
@pytest.mark.parametrize("unit_mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_kinds(unit_mean, dtype, device):
    check(*case(device, dtype, 64, random.randint(65, 150)), unit_mean)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("dim", [16, 32, 96, 128, 192, 256])
@pytest.mark.parametrize("n", [1, 64, 70])
def test_head_dims_and_lengths(dim, n, device):
    check(*case(device, torch.float16, dim, n), True)


@pytest.mark.usefixtures("seed")
def test_a_batch_that_is_cut_is_the_same(device, monkeypatch):
    keys, valid = case(device, torch.float16, 32, 40)
    whole = similarity.mean_key_similarity(keys, valid)
    monkeypatch.setattr(launching, "WORKSPACE_BYTES", 1)
    assert torch.equal(similarity.mean_key_similarity(keys, valid), whole)


def test_no_keys(device):
    keys = torch.zeros(1, 2, 0, 16, dtype=torch.float16, device=device)
    mask = torch.ones(1, 2, 0, dtype=torch.bool, device=device)
    assert similarity.mean_key_similarity(keys, mask).shape == (1, 2, 0)
    with pytest.raises(ValueError, match="takes_part has shape"):
        similarity.mean_key_similarity(keys, mask[:, :1])
