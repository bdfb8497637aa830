from __future__ import annotations

import pytest
import torch

from kvpolicy import ops
from kvpolicy.contracts.view import Rope

INV_FREQ = 1.0 / 10000 ** (torch.arange(0, 16, 2).float() / 16)


def tables(positions, interleaved=False):
    angle = positions[..., None].float() * INV_FREQ
    doubled = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
    return doubled.cos(), doubled.sin()


@pytest.mark.parametrize("interleaved", [False, True])
def test_equals_transformers(interleaved):
    from transformers.models.cohere import modeling_cohere
    from transformers.models.llama import modeling_llama

    reference = (modeling_cohere if interleaved else modeling_llama).apply_rotary_pos_emb
    x = torch.randn(2, 3, 7, 16)
    positions = torch.randint(0, 5000, (2, 7))
    expected, _ = reference(x, x, *tables(positions, interleaved))
    turned = ops.rotate(x, Rope(INV_FREQ, interleaved), positions[:, None])
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=1e-5)


def test_partial_rotary_leaves_the_rest():
    x = torch.randn(1, 2, 5, 24)
    delta = torch.arange(5).expand(1, 2, 5)
    turned = ops.rotate(x, Rope(INV_FREQ), delta)
    assert torch.equal(turned[..., 16:], x[..., 16:])
    torch.testing.assert_close(turned[..., :16], ops.rotate(x[..., :16], Rope(INV_FREQ), delta))


@pytest.mark.parametrize("interleaved", [False, True])
def test_there_and_back_and_in_steps(interleaved):
    rope = Rope(INV_FREQ, interleaved)
    x = torch.randn(2, 2, 6, 16)
    there = torch.randint(-300, 300, (2, 2, 6))
    torch.testing.assert_close(ops.rotate(ops.rotate(x, rope, there), rope, -there), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        ops.rotate(ops.rotate(x, rope, there), rope, 7 - there), ops.rotate(x, rope, torch.full((2, 2, 6), 7)),
        atol=1e-4, rtol=0,
    )  # fmt: skip
    assert torch.equal(ops.rotate(x, rope, torch.zeros(1, dtype=torch.int32)), x)


def test_logits_depend_on_distance_only():
    rope = Rope(INV_FREQ)
    query, key = torch.randn(1, 16), torch.randn(1, 16)
    near = ops.rotate(query, rope, torch.tensor([9])) @ ops.rotate(key, rope, torch.tensor([4])).T
    far = ops.rotate(query, rope, torch.tensor([1009])) @ ops.rotate(key, rope, torch.tensor([1004])).T
    torch.testing.assert_close(near, far, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computes_in_fp32_and_returns_the_dtype(dtype):
    x = torch.randn(1, 1, 4, 16).to(dtype)
    delta = torch.tensor([3, 1000, -5, 0])
    turned = ops.rotate(x, Rope(INV_FREQ), delta)
    assert turned.dtype == dtype
    assert torch.equal(turned, ops.rotate(x.float(), Rope(INV_FREQ), delta).to(dtype))


def test_a_poisoned_slot_stays_alone():
    x = torch.randn(1, 1, 4, 16)
    x[0, 0, 2] = float("nan")
    assert ops.rotate(x, Rope(INV_FREQ), torch.arange(4))[0, 0, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "rotated"), [((3, 5, 700, 16), 16), ((2, 2, 1500, 40), 24), ((9000, 8), 8), ((1, 1, 20000, 4), 4)]
)
def test_what_is_cut_into_pieces_is_the_same_bit_for_bit(shape, rotated, dtype, interleaved):
    torch.manual_seed(0)
    whole = torch.randn(*shape[:-2], shape[-2] + 3, shape[-1]).to(dtype)
    x = whole[..., : shape[-2], :]  # not contiguous, as an arena's
    rope = Rope(1e4 ** -torch.linspace(0, 1, rotated // 2), interleaved=interleaved)
    delta = -torch.randint(0, 40_000, (shape[-2],))  # one for all heads
    assert x[..., 0].numel() * (rotated // 2) > 1 << 15, "larger than a piece"
    found = ops.rotate(x, rope, delta)
    assert found.dtype == dtype
    assert found.is_contiguous()
    for at in range(0, shape[-2], 123):
        part = slice(at, at + 123)
        assert torch.equal(found[..., part, :], ops.rotate(x[..., part, :].contiguous(), rope, delta[part]))
