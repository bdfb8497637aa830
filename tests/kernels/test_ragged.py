from __future__ import annotations

import random

import pytest
import torch

from kvpolicy import ops
from kvpolicy.errors import UnsupportedError
from kvpolicy.ops.ragged import Blocks
from kvpolicy_kernels import ragged

P = 16


def case(device, dtype, dim, out_dim, group, count, tail, counts, *, masked=False, sinks=False, softcap=None):
    """A base with the given entries per head (two heads a row), leftovers in free slots, and a tail."""
    counts = torch.tensor(counts)
    owners = counts.numel()
    blocks = (counts + P - 1) // P
    owner = torch.repeat_interleave(torch.arange(owners), blocks)
    number = torch.arange(owner.numel()) - (blocks.cumsum(0) - blocks)[owner]
    filled = (counts[owner] - number * P).clamp(max=P)
    base = Blocks(
        torch.randn(owner.numel(), P, dim).to(dtype).to(device),
        torch.randn(owner.numel(), P, out_dim).to(dtype).to(device),
        owner.to(device), filled.to(device),
    )  # fmt: skip
    batch, heads = owners // 2, 2
    seen = None
    if masked:
        seen = (torch.rand(batch, 1, count, tail) > 0.3).to(device)
        seen[0, 0, 0] = False
    return {
        "queries": torch.randn(batch, count, heads * group, dim).to(dtype).to(device).transpose(1, 2),
        "base": base,
        "tail_keys": torch.randn(batch, heads, tail + 4, dim).to(dtype).to(device)[:, :, :tail],
        "tail_values": torch.randn(batch, heads, tail + 4, out_dim).to(dtype).to(device)[:, :, :tail],
        "visible": seen,
        "scale": dim**-0.5,
        "softcap": softcap,
        "attention_sinks": torch.randn(heads, group, device=device) if sinks else None,
    }


def reference(queries, base, tail_keys, tail_values, visible, scale, softcap, attention_sinks):
    """In float64, one query head and one query at a time."""
    batch, query_heads, count, _ = queries.shape
    heads, tail = tail_keys.shape[1:3]
    out = torch.zeros(*queries.shape[:3], tail_values.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for head in range(query_heads):
            h = head // (query_heads // heads)
            mine = [m for m in range(base.owner.numel()) if base.owner[m] == b * heads + h]
            old = [(m, s) for m in mine for s in range(int(base.filled[m]))]
            for q in range(count):
                seen = [t for t in range(tail) if visible is None or visible[b, 0, q, t]]
                keys = [base.keys[m, s] for m, s in old] + [tail_keys[b, h, t] for t in seen]
                values = [base.values[m, s] for m, s in old] + [tail_values[b, h, t] for t in seen]
                if not keys:
                    continue
                logits = torch.stack(keys).double() @ queries[b, head, q].double() * scale
                if softcap is not None:
                    logits = torch.tanh(logits / softcap) * softcap
                if attention_sinks is not None:
                    sink = attention_sinks[h, head % (query_heads // heads)].double()
                    logits = torch.cat([logits, sink[None]])
                weights = torch.softmax(logits, 0)[: len(values)]
                out[b, head, q] = weights @ torch.stack(values).double()
    return out


def check(inputs, tolerance):
    got = ragged.ragged_attention(**inputs)
    assert got.dtype == inputs["queries"].dtype
    cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    cpu["base"] = Blocks(*(t.cpu() for t in inputs["base"]))
    want = reference(**cpu)
    assert torch.isfinite(got).all()
    error = (got.cpu().double() - want).abs().max() / want.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


# The output is rounded to the cache's dtype; the interpreter truncates when it casts to bf16.
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.usefixtures("seed", "grid_order")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_decode(dtype, group, device):
    if dtype == torch.float32 and device.type == "cuda":
        pytest.skip("fp32 caches are refused on a GPU")
    counts = [random.randint(0, 150), 0, random.randint(1, 40), 16]
    inputs = case(device, dtype, 64, 64, group, 1, random.randint(1, 70), counts, sinks=group == 3)
    check(inputs, ROUNDING[dtype])


@pytest.mark.usefixtures("seed", "grid_order")
@pytest.mark.parametrize(("dim", "out_dim"), [(96, 96), (192, 128), (256, 256), (64, 192), (16, 96)])
def test_wide_heads_and_those_that_are_no_power_of_two(dim, out_dim, device):
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    inputs = case(device, dtype, dim, out_dim, 2, 1, random.randint(1, 40), [random.randint(33, 90), 0, 1, 16])
    check(inputs, ROUNDING[dtype])


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_soft_cap_with_sinks_over_several_wide_queries(dtype, device):
    if dtype == torch.float32 and device.type == "cuda":
        pytest.skip("fp32 caches are refused on a GPU")
    inputs = case(device, dtype, 256, 256, 2, 9, 21, [40, 0], masked=True, sinks=True, softcap=1.5)
    check(inputs, ROUNDING[dtype])


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("sinks", [False, True])
def test_several_queries_with_a_mask(sinks, device):
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    inputs = case(device, dtype, 32, 64, 2, 11, 30, [70, 0, 0, 33], masked=True, sinks=sinks)
    check(inputs, ROUNDING[dtype])


@pytest.mark.usefixtures("seed")
def test_more_lines_than_a_tile_and_more_splits(device, monkeypatch):
    monkeypatch.setattr(ragged, "_PROGRAMS", 30)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    check(case(device, dtype, 16, 16, 5, 14, 3, [300, 65], masked=True), ROUNDING[dtype])


@pytest.mark.usefixtures("seed")
def test_a_query_that_sees_nothing_gets_zeros(device):
    inputs = case(device, torch.float16, 64, 64, 2, 2, 5, [0, 0], masked=True)
    assert (ragged.ragged_attention(**inputs)[0, :, 0] == 0).all()
    inputs["base"] = Blocks(*(t[:0] for t in inputs["base"]))
    check(inputs, ROUNDING[torch.float16])


@pytest.mark.usefixtures("seed")
def test_bases_of_the_same_size_are_not_mixed_up(device):
    first = case(device, torch.float16, 64, 64, 1, 1, 3, [16, 48, 32, 0])
    second = case(device, torch.float16, 64, 64, 1, 1, 3, [32, 16, 16, 32])
    for inputs in (first, second, first):
        check(inputs, ROUNDING[torch.float16])


@pytest.mark.usefixtures("seed")
def test_refusals(device):
    inputs = case(device, torch.float16, 64, 64, 1, 1, 3, [16, 3])
    odd = case(device, torch.float16, 64, 48, 1, 1, 3, [16, 3])
    with ops.using_backend("triton"):
        with pytest.raises(UnsupportedError, match="the head dim is 48"):
            ops.ragged_attention(**odd)
        with pytest.raises(UnsupportedError, match=r"float32 queries with torch\.float16 keys"):
            ops.ragged_attention(**{**inputs, "queries": inputs["queries"].float()})
    with pytest.raises(UnsupportedError, match="the head dim is 48"):
        ragged.ragged_attention(**odd)
    with pytest.raises(ValueError, match="tail_values has shape"):
        ragged.ragged_attention(**{**inputs, "tail_values": inputs["tail_values"][:, :1]})


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_are_fp32_before_they_are_scaled(dtype, device):
    """Products of 5e5 and more do not fit into fp16, and bf16 would round them to 3 digits."""
    inputs = case(device, dtype, 128, 64, 2, 1, 9, [70, 20], sinks=True)
    inputs["queries"] = inputs["queries"] * 25
    inputs["base"].keys.mul_(100)
    inputs["tail_keys"] = inputs["tail_keys"] * 100
    inputs["tail_keys"][:, :, 3] = inputs["queries"][:, ::2, 0] * 8
    assert (inputs["queries"][:, ::2, 0].double() * inputs["tail_keys"][:, :, 3].double()).sum(-1).max() > 5e5
    check(inputs, ROUNDING[dtype])
