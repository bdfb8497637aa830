"""The hash behind random policies: reference values, independence of batch and shape, and quality."""

from __future__ import annotations

import itertools

import torch

from kvpolicy import ops


def murmur3(words):
    """MurmurHash3_x86_32 of 32-bit words with seed 0, its length left out of the finish."""
    h = 0
    for word in words:
        k = word * 0xCC9E2D51 & 0xFFFFFFFF
        k = (k << 15 | k >> 17) & 0xFFFFFFFF
        h ^= k * 0x1B873593 & 0xFFFFFFFF
        h = (h << 13 | h >> 19) & 0xFFFFFFFF
        h = (h * 5 + 0xE6546B64) & 0xFFFFFFFF
    h ^= h >> 16
    h = h * 0x85EBCA6B & 0xFFFFFFFF
    h ^= h >> 13
    h = h * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


def draws(seed=0, layer=0, heads=1, positions=1, compactions=1):
    head = torch.arange(heads)[None, :, None]
    position = torch.arange(positions, dtype=torch.int32)[None, None, :]
    return ops.counter_uniform(seed, layer, head, position, torch.arange(compactions)[:, None, None])


def test_reference_values():
    seed, layer = 2**40 + 17, 5
    numbers = draws(seed, layer, heads=3, positions=4, compactions=2)
    for c, h, p in itertools.product(range(2), range(3), range(4)):
        expected = (murmur3([seed & 0xFFFFFFFF, seed >> 32, layer, c, h, p]) >> 8) / 2**24
        assert numbers[c, h, p].item() == expected


def test_integer_dtype_and_shape_do_not_matter():
    head, compaction = torch.tensor([[2]]), torch.tensor([[[3]]])
    at = torch.tensor([[[7, 70000, 12]]])
    whole = ops.counter_uniform(1, 2, head, at, compaction)
    for dtype in (torch.int32, torch.int64):
        for i in range(3):
            single = ops.counter_uniform(1, 2, head.to(dtype), at[..., i : i + 1].to(dtype), compaction.to(dtype))
            assert single.item() == whole[0, 0, i].item()


def test_uniform():
    numbers = draws(seed=3, heads=64, positions=2048).flatten()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean().item() - 0.5) < 5 * (1 / 12 / numbers.numel()) ** 0.5
    assert abs(numbers.var().item() - 1 / 12) < 1e-3
    share = torch.histc(numbers, 256, 0, 1)
    chi2 = ((share - share.mean()) ** 2 / share.mean()).sum().item()
    assert 255 - 5 * 22.6 < chi2 < 255 + 5 * 22.6


def test_neighbours_are_not_correlated():
    def correlation(x, y):
        return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].abs().item()

    base = draws(heads=16, positions=1024, compactions=4)
    bound = 5 / base.numel() ** 0.5
    assert correlation(base[:, :, 1:], base[:, :, :-1]) < bound
    assert correlation(base[:, 1:], base[:, :-1]) < bound * 1.1
    assert correlation(base[1:], base[:-1]) < bound * 1.2
    assert correlation(base, draws(layer=1, heads=16, positions=1024, compactions=4)) < bound
    assert correlation(base, draws(seed=1, heads=16, positions=1024, compactions=4)) < bound
    assert correlation(base, draws(seed=2**32, heads=16, positions=1024, compactions=4)) < bound


def test_order_within_heads_differs():
    order = draws(heads=8, positions=64).argsort(-1)[0]
    assert len({tuple(row.tolist()) for row in order}) == 8
