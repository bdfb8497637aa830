"""What flash attention computes, in float64: a stand-in for kernels that need a GPU, with their signatures.

Written from the interface that `flash_attn` documents: `[batch, tokens, heads, dim]`, or packed sequences with their
cumulative lengths; fewer KV heads than query heads; causal masks aligned at the end of both sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float, sinks: Tensor | None, *, causal: bool
) -> Tensor:
    """One sequence: `[n, Hq, D]` against `[m, H, D]`."""
    n, heads, dim = q.shape
    m, kv_heads = k.shape[:2]
    group = heads // kv_heads
    query, key, value = (t.double().transpose(0, 1) for t in (q, k, v))
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    logits = query @ key.transpose(1, 2) * (dim**-0.5 if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:
        first = torch.arange(n)[:, None] + (m - n)  # the last entry that each token sees
        logits = logits.masked_fill(torch.arange(m) > first, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None, None].expand(-1, n, 1)], 2)
    weights = logits.softmax(-1)[:, :, :m].nan_to_num(0.0)
    return (weights @ value).transpose(0, 1).to(q.dtype)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float, sinks: Tensor | None, *, causal: bool
) -> Tensor:
    """Rows of one length, `[B, n, Hq, D]`."""
    rows = zip(q, k, v, strict=True)
    return torch.stack([_attend(*row, scale, softcap, sinks, causal=causal) for row in rows])


def _packed(
    q: Tensor, k: Tensor, v: Tensor, starts: tuple[Tensor, Tensor], longest: tuple[int, int], scale: float | None,
    softcap: float, sinks: Tensor | None, *, causal: bool,
) -> Tensor:  # fmt: skip
    """Packed rows, `[tokens, Hq, D]`; kernels read past the end where these numbers do not fit."""
    for packed, start, most in zip((q, k), starts, longest, strict=True):
        assert start.dtype == torch.int32
        assert int(start[-1]) == packed.shape[0]
        assert int(start.diff().max()) == most
    tokens, entries = (start.diff().tolist() for start in starts)
    rows = zip(q.split(tokens), k.split(entries), v.split(entries), strict=True)
    return torch.cat([_attend(*row, scale, softcap, sinks, causal=causal) for row in rows])


def flash2_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """`flash_attn_func` of the second version."""
    assert not dropout_p
    assert window_size == (-1, -1)
    return _rows(q, k, v, softmax_scale, softcap, None, causal=causal)


def flash2_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """`flash_attn_varlen_func` of the second version, which knows no attention sinks."""
    assert not dropout_p
    assert window_size == (-1, -1)
    starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return _packed(q, k, v, starts, longest, softmax_scale, softcap, None, causal=causal)


def flash3_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, s_aux: Tensor | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """`flash_attn_func` of the third version, which knows attention sinks, drops nothing and returns a tuple."""
    assert window_size == (-1, -1)
    return _rows(q, k, v, softmax_scale, softcap, s_aux, causal=causal), None


def flash3_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, s_aux: Tensor | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """`flash_attn_varlen_func` of the third version."""
    assert window_size == (-1, -1)
    starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return _packed(q, k, v, starts, longest, softmax_scale, softcap, s_aux, causal=causal), None


KERNELS = {
    "flash_attention_2": (flash2_func, flash2_varlen_func),
    "flash_attention_3": (flash3_func, flash3_varlen_func),
    "kernels-community/flash-attn2": (flash2_func, flash2_varlen_func),
    "kernels-community/vllm-flash-attn3": (flash3_func, flash3_varlen_func),
}


@contextmanager
def stand_in_kernels() -> Iterator[None]:
    """Let transformers find these functions where it looks for kernels, by the name that it is given."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers import modeling_flash_attention_utils as utils
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import flash_attention_mask

    real = utils._lazy_imports

    def imports(implementation: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        functions = KERNELS[implementation]
        if "allow_all_kernels" in real.__code__.co_varnames:  # newer versions look for a third one
            return *functions, None, utils._pad_input, utils._unpad_input
        return *functions, utils._pad_input, utils._unpad_input

    for name in KERNELS:
        if name.startswith("kernels-community"):  # as loading one from the hub registers it
            AttentionInterface.register(name, flash_attention_forward)
            AttentionMaskInterface.register(name, flash_attention_mask)
    with mock.patch.object(utils, "_lazy_imports", imports), mock.patch.object(utils, "_loaded_implementation", None):
        yield
