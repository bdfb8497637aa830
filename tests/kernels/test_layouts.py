"""Any strides give the same bits as keys that lie without a gap, and the same call gives them again."""

from __future__ import annotations

import os

import pytest
import torch

from kvpolicy.ops.ragged import Blocks
from kvpolicy.types import KeepIndices
from kvpolicy_kernels import compaction, density, ragged, served, similarity, window

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HALVES = (torch.float16, torch.bfloat16)
# The interpreter is slow; a device has all of them.
CASES = (
    [(d, n) for d in HALVES for n in served.HEAD_DIMS] if not INTERPRETING else list(zip(HALVES, (32, 96), strict=True))
)
N, GROUP, OBSERVE = 70, 2, 8


def token_major(t):
    """`[B, N, H, D]` in memory, as attention makes keys."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def in_an_arena(t):
    """Of a layer in the middle, with free slots behind it that hold NaN."""
    arena = torch.full((3, *t.shape[:2], t.shape[2] + 5, t.shape[3]), float("nan"), device=t.device).to(t.dtype)
    arena[1, :, :, : t.shape[2]] = t
    return arena[1, :, :, : t.shape[2]]


def some_heads_of_more(t):
    """Heads in the middle of others."""
    return torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]]


def wide(t):
    """The first numbers of longer keys, at an address that is no multiple of 16 bytes."""
    return torch.cat([t[..., :3], t, t[..., :5]], -1)[..., 3 : 3 + t.shape[-1]]


LAYOUTS = (token_major, in_an_arena, some_heads_of_more, wide)


def importance(keys, queries, valid):
    positions = torch.arange(N, dtype=torch.int32, device=keys.device).expand(2, 2, N)
    asked = torch.ones(2, OBSERVE, dtype=torch.bool, device=keys.device)
    at = positions[:, 0, -OBSERVE:].contiguous()
    return window.window_importance(queries, at, asked, keys, positions, valid, scale=keys.shape[-1] ** -0.5)


def nearness(keys, _queries, valid):
    return density.key_density(keys, valid, bandwidth=0.2)


def twins(keys, _queries, valid):
    return similarity.redundancy(keys, valid, beta=2)


def moved(keys, _queries, valid):
    """Compacts keys where they lie; what is returned is all of them, also behind the kept ones."""
    indices = torch.arange(0, N, 2, device=keys.device).expand(2, 2, -1)
    compaction.compact(keys, KeepIndices(indices, torch.full((2, 2), indices.shape[-1], device=keys.device)))
    return keys


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(("dtype", "dim"), CASES)
@pytest.mark.parametrize("operation", [importance, nearness, twins, moved])
def test_strides_change_no_bit_and_a_second_call_neither(operation, dim, dtype, device):
    common = torch.randn(2, 2, 1, dim)
    keys = (common + torch.randn(2, 2, N, dim)).to(dtype).to(device)
    queries = (0.5 * torch.randn(2, 2, GROUP, OBSERVE, dim) + 0.2 * common[:, :, None]).to(dtype).to(device)
    valid = (torch.rand(2, 2, N) > 0.1).to(device)
    want = operation(keys.clone(), queries, valid).clone()
    assert want.isfinite().all()
    assert torch.equal(operation(keys.clone(), queries, valid), want)
    for layout in LAYOUTS:
        laid = layout(keys)
        assert laid.stride() != keys.stride()
        got = operation(laid, layout(queries.flatten(1, 2)).unflatten(1, (2, GROUP)), valid)
        assert torch.equal(got, want), layout.__name__


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(("dtype", "dim"), CASES)
def test_attention_over_heads_of_different_lengths(dim, dtype, device):
    owner = torch.tensor([0, 0, 1, 3, 3, 3], device=device)
    filled = torch.tensor([16, 9, 16, 16, 16, 2], device=device)
    blocks = Blocks(*(torch.randn(6, 16, dim, device=device).to(dtype) for _ in range(2)), owner, filled)
    tail, values = (torch.randn(2, 2, 21, dim, device=device).to(dtype) for _ in range(2))
    queries = torch.randn(2, 2 * GROUP, 1, dim, device=device).to(dtype)

    def attend(change):
        given = (change(t) for t in (queries, tail, values))
        return ragged.ragged_attention(next(given), blocks, *given, None, scale=dim**-0.5)

    want = attend(torch.clone)
    assert want.isfinite().all()
    assert torch.equal(attend(torch.clone), want)
    for layout in LAYOUTS:
        assert torch.equal(attend(layout), want), layout.__name__
    for row in range(2):
        for head in range(2 * GROUP):
            mine = owner == 2 * row + head // GROUP
            lines = torch.arange(16, device=device) < filled[mine, None]
            k, v = (
                torch.cat([part[mine][lines], rest[row, head // GROUP]]).double()
                for part, rest in ((blocks.keys, tail), (blocks.values, values))
            )
            exact = torch.softmax(k @ queries[row, head, 0].double() * dim**-0.5, 0) @ v
            got = want[row, head, 0].double()
            # The output is rounded to the cache's dtype, and the interpreter truncates.
            assert (got - exact).abs().max() < 1.1 * torch.finfo(dtype).eps * exact.abs().max()
