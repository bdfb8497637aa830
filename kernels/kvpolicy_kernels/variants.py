"""The calls that stand for all kernels: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpolicy.ops.dispatch import using_backend
from kvpolicy.ops.ragged import Blocks
from kvpolicy.types import KeepIndices
from kvpolicy_kernels import compaction, density, ragged, selection, similarity, window

_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_SLOTS = 160  # divisible by 16, as the strides of an arena are


def variants(*, full: bool) -> dict[str, Callable[[], object]]:
    """Return calls by label. `full` spans dtypes, head dims, groups and options."""
    calls: dict[str, Callable[[], object]] = {}
    widths = [(torch.bfloat16, 64), (torch.bfloat16, 128)]
    if full:
        widths += [(torch.bfloat16, 16), (torch.bfloat16, 32), (torch.float16, 128)]
    for dtype, dim in widths:
        # Every option for one head dim of one dtype; fp16 is laid out as bf16 is.
        _of_keys(calls, dtype, dim, every=full and (dtype, dim) == (torch.bfloat16, 128), full=full)
    for dim in (96, 192, 256) if full else (192,):
        _of_wide_keys(calls, dim)
    _of_options(calls)
    for slots in (200, 1000, 2000, 4000, 20000) if full else (1000, 4000, 20000):
        calls[f"top_k {slots}"] = partial(_top_k, slots)
    calls["positions"] = partial(_compact, torch.int32, ())
    if full:
        calls["state"] = partial(_compact, torch.float32, (3,))
        calls["flags"] = partial(_compact, torch.int8, ())
        calls["means"] = partial(similarity.mean_similarity, _keys(torch.float16, 64), _mask())
    return calls


def _of_keys(calls: dict[str, Callable[[], object]], dtype: torch.dtype, dim: int, *, every: bool, full: bool) -> None:
    """Add the calls that read keys; every option for one head dim, and some for the others."""
    name, wide = f"{_SHORT[dtype]} D{dim}", dim == 128
    for group in (1, 2, 3, 4, 5, 6, 7, 8, 16) if every else (1, 3, 8) if full else (4, 8) if wide else (3,):
        calls[f"{name} rkv G{group}"] = partial(_importance, dtype, dim, group, 8, shared=True)
    snapkv: dict[str, Any] = {"group_stage": "weights", "softmax_over": "row", "mean": True}
    for group in (1, 4, 7, 8) if every else (4,) if wide or full else ():
        for queries in (8, 32):
            calls[f"{name} snapkv G{group} Q{queries}"] = partial(_importance, dtype, dim, group, queries, **snapkv)
    if full:
        calls[f"{name} mean logits"] = partial(_importance, dtype, dim, 4, 16, mean=True, softmax_over="row")
        calls[f"{name} rkv Q32"] = partial(_importance, dtype, dim, 8, 32, shared=True)
        calls[f"{name} max weights"] = partial(_importance, dtype, dim, 4, 16, group_stage="weights")
    for beta in (0, 1, 2, 3, 4) if every else (1, 3) if wide else (1,):
        calls[f"{name} beta{beta}"] = partial(_redundancy, dtype, dim, beta=beta)
    if dim >= 64:
        calls[f"{name} mean key"] = partial(similarity.mean_key_similarity, _keys(dtype, dim), _mask())
    if wide or full:
        calls[f"{name} index_zero"] = partial(_redundancy, dtype, dim, index_zero=True)
    if full:
        calls[f"{name} own"] = partial(_redundancy, dtype, dim, own=True)
        calls[f"{name} own index_zero"] = partial(_redundancy, dtype, dim, own=True, index_zero=True)
    for group in (1, 8, 16) if every else (4,):
        for count in (1, 5, 64) if every else (1,):
            calls[f"{name} ragged G{group} q{count}"] = partial(_ragged, dtype, dim, group, count)
    calls[f"{name} ragged masked"] = partial(_ragged, dtype, dim, 2, 2, masked=True)
    calls[f"{name} compact"] = partial(_compact, dtype, (dim,))


def _of_wide_keys(calls: dict[str, Callable[[], object]], dim: int) -> None:
    """Add the calls that read keys in parts."""
    name = f"bf16 D{dim}"
    calls[f"{name} rkv G4"] = partial(_importance, torch.bfloat16, dim, 4, 8, shared=True)
    calls[f"{name} redundancy"] = partial(_redundancy, torch.bfloat16, dim)
    calls[f"{name} mean key"] = partial(similarity.mean_key_similarity, _keys(torch.bfloat16, dim), _mask())
    calls[f"{name} ragged G4"] = partial(_ragged, torch.bfloat16, dim, 4, 1)
    calls[f"{name} ragged masked"] = partial(_ragged, torch.bfloat16, dim, 8, 16, masked=True)
    if dim == 256:
        calls[f"{name} snapkv"] = partial(
            _importance, torch.bfloat16, dim, 4, 32, group_stage="weights", softmax_over="row", mean=True
        )
        calls[f"{name} all options"] = partial(_redundancy, torch.bfloat16, dim, beta=3, own=True, index_zero=True)


def _of_options(calls: dict[str, Callable[[], object]]) -> None:
    """Add models with soft-cap and sinks, other ways of smoothing, and kernel densities."""
    model: dict[str, Any] = {"softcap": 50.0, "attention_sinks": torch.empty(2, 4)}
    calls["soft-cap"] = partial(_importance, torch.bfloat16, 64, 4, 8, **model)
    calls["soft-cap by head"] = partial(
        _importance, torch.bfloat16, 64, 4, 8, group_stage="weights", softmax_over="row", mean=True, **model
    )
    calls["each"] = partial(_importance, torch.bfloat16, 64, 4, 8, shared=True, smooth_stage="query")
    calls["each mean"] = partial(
        _importance, torch.bfloat16, 64, 4, 8, shared=True, smooth_stage="query", smooth_kind="mean"
    )
    calls["ragged soft-cap"] = partial(_ragged, torch.bfloat16, 256, 2, 1, softcap=50.0)
    calls["ragged values that differ"] = partial(_ragged, torch.bfloat16, 192, 1, 1, out_dim=128)
    for dtype, dim, lower in ((torch.float32, 64, 0.3), (torch.float32, 128, 0.3), (torch.float32, 64, 1.0)):
        calls[f"density {dtype} D{dim} {lower}"] = partial(_density, dtype, dim, lower)
    calls["density bf16"] = partial(_density, torch.bfloat16, 128)


def _density(dtype: torch.dtype, dim: int, lower: float = 0.3) -> None:
    density.key_density(_keys(dtype, dim), _mask(), bandwidth=0.15, priority=torch.empty(2, 2, _SLOTS), lower=lower)


def _keys(dtype: torch.dtype, dim: int) -> Tensor:
    return torch.empty(2, 2, 2 * _SLOTS, dim, dtype=dtype)[:, :, :_SLOTS]


def _mask() -> Tensor:
    return torch.empty(2, 2, _SLOTS, dtype=torch.bool)


def _importance(
    dtype: torch.dtype, dim: int, group: int, queries: int, *, mean: bool = False, shared: bool = False, **options: Any
) -> None:
    with using_backend("triton", shared=shared):
        window.window_importance(
            torch.empty(2, 2, group, queries, dim, dtype=dtype),
            torch.empty(2, queries, dtype=torch.int32), torch.empty(2, queries, dtype=torch.bool),
            _keys(dtype, dim), torch.empty(2, 2, _SLOTS, dtype=torch.int32), _mask(),
            scale=0.125, group="mean" if mean else "max", **options,
        )  # fmt: skip


def _redundancy(dtype: torch.dtype, dim: int, *, beta: int = 1, own: bool = False, index_zero: bool = False) -> None:
    similarity.redundancy(
        _keys(dtype, dim), _mask(), beta=beta, spare="own" if own else "newest", index_zero=index_zero
    )


def _compact(dtype: torch.dtype, trailing: tuple[int, ...]) -> None:
    kept = KeepIndices(torch.empty(2, 2, 64, dtype=torch.int64), torch.empty(2, 2, dtype=torch.int64))
    compaction.compact(torch.empty(2, 2, _SLOTS, *trailing, dtype=dtype), kept)


def _ragged(
    dtype: torch.dtype, dim: int, group: int, count: int, *,
    masked: bool = False, softcap: float | None = None, out_dim: int | None = None,
) -> None:  # fmt: skip
    keys, values = (torch.empty(8, 16, size, dtype=dtype) for size in (dim, out_dim or dim))
    base = Blocks(keys, values, torch.arange(8) // 2, torch.full((8,), 16))
    tail, tail_values = (torch.empty(2, 2, 128, size, dtype=dtype) for size in (dim, out_dim or dim))
    seen = torch.empty(2, 1, count, 128, dtype=torch.bool) if masked else None
    sinks = torch.empty(2, group, dtype=dtype) if masked else None
    queries = torch.empty(2, 2 * group, count, dim, dtype=dtype)
    ragged.ragged_attention(queries, base, tail, tail_values, seen, scale=0.125, softcap=softcap, attention_sinks=sinks)


def _top_k(slots: int) -> None:
    mask = torch.empty(2, 2, slots, dtype=torch.bool)
    counts = torch.empty(2, 2, dtype=torch.int64)
    selection.top_k(torch.empty(2, 2, slots), counts, mask, mask, width=64)
