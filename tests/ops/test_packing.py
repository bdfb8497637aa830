"""`pack` and `unpack` against plain indexing."""

from __future__ import annotations

import torch

from kvpolicy import ops


def test_pack_moves_what_is_marked_to_the_front():
    mask = torch.tensor([[[False, True, True, False, True], [False] * 5]])
    x = torch.arange(10.0).reshape(1, 2, 5)
    assert ops.pack(x, mask, fill=-1.0).tolist() == [[[1.0, 2.0, 4.0, -1.0, -1.0], [-1.0] * 5]]
    vectors = torch.stack([x, x + 0.5], dim=-1)
    assert ops.pack(vectors, mask)[0, 0].tolist() == [[1.0, 1.5], [2.0, 2.5], [4.0, 4.5], [0.0, 0.0], [0.0, 0.0]]


def test_unpack_is_the_inverse():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 2, 9, generator=generator) < 0.6
    x = torch.where(mask, torch.randn(3, 2, 9, generator=generator), float("nan"))
    back = ops.unpack(ops.pack(x, mask), mask, fill=7.0)
    assert torch.equal(back, torch.where(mask, x, 7.0))


def test_a_mask_is_broadcast():
    mask = torch.tensor([[[True, False, True]]])
    x = torch.arange(12.0).reshape(2, 2, 3)
    assert ops.pack(x, mask).tolist() == [[[0, 2, 0], [3, 5, 0]], [[6, 8, 0], [9, 11, 0]]]
    assert torch.equal(ops.unpack(ops.pack(x, mask), mask), x * mask)


def test_no_slots():
    assert ops.pack(torch.zeros(1, 2, 0), torch.zeros(1, 2, 0, dtype=torch.bool)).shape == (1, 2, 0)
