"""Whether the arguments of an operation fit together: checked once for every backend, before one is chosen.

Only shapes, dtypes and devices are looked at, never contents, which would make the host wait for a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpolicy.types import KeepIndices


def expect(
    tensor: Tensor, name: str, shape: tuple[int, ...] | str, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Check one argument; raises ValueError that names it.

    Args:
        tensor: the argument.
        name: what the error calls it.
        shape: its shape, or one letter per dimension where only their number is known.
        dtype: its dtype; None for any floating-point one.
        device: where it must be.
    """
    if len(tensor.shape) != len(shape) if isinstance(shape, str) else tuple(tensor.shape) != shape:
        wanted = f"[{', '.join(shape)}]" if isinstance(shape, str) else f"{list(shape)}, to fit the other arguments"
        raise ValueError(f"{name} has shape {list(tensor.shape)}; give {wanted}.")
    if dtype is None and not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} is {tensor.dtype}; give a floating-point dtype.")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}; give {dtype}.")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but other arguments are on {device}; move it there.")


def redundancy(keys: Tensor, valid: Tensor, *, participates: Tensor | None = None, **options: Any) -> None:
    """Check the arguments of `ops.redundancy`."""
    mean_similarity(keys, valid, name="valid", **options)
    if participates is not None:
        expect(participates, "participates", tuple(valid.shape), torch.bool, keys.device)


def mean_similarity(keys: Tensor, takes_part: Tensor, *, name: str = "takes_part", **options: Any) -> None:
    """Check the arguments of `ops.mean_similarity`."""
    expect(keys, "keys", "BHND", None, keys.device)
    expect(takes_part, name, tuple(keys.shape[:3]), torch.bool, keys.device)
    beta, spare = options.get("beta", 1), options.get("spare", "newest")
    if beta < 0:
        raise ValueError(f"beta is {beta}; give 0 or more.")
    if spare not in ("newest", "own"):
        raise ValueError(f"spare is {spare!r}; give 'newest' or 'own'.")


def mean_key_similarity(keys: Tensor, takes_part: Tensor, **_: Any) -> None:
    """Check the arguments of `ops.mean_key_similarity`."""
    expect(keys, "keys", "BHND", None, keys.device)
    expect(takes_part, "takes_part", tuple(keys.shape[:3]), torch.bool, keys.device)


def window_importance(
    queries: Tensor, query_positions: Tensor, query_valid: Tensor, keys: Tensor, positions: Tensor, valid: Tensor,
    *, attention_sinks: Tensor | None = None, **_: Any,
) -> None:  # fmt: skip
    """Check the arguments of `ops.window_importance`."""
    device = keys.device
    expect(keys, "keys", "BHND", None, device)
    expect(queries, "queries", "BHGQD", None, device)
    batch, heads, slots, dim = keys.shape
    group, count = queries.shape[2:4]
    expect(queries, "queries", (batch, heads, group, count, dim), None, device)
    expect(query_positions, "query_positions", (batch, count), torch.int32, device)
    expect(query_valid, "query_valid", (batch, count), torch.bool, device)
    expect(positions, "positions", (batch, heads, slots), torch.int32, device)
    expect(valid, "valid", (batch, heads, slots), torch.bool, device)
    if attention_sinks is not None:
        expect(attention_sinks, "attention_sinks", (heads, group), None, device)


def key_density(
    keys: Tensor, valid: Tensor, *, bandwidth: float, priority: Tensor | None = None, lower: float = 1.0
) -> None:
    """Check the arguments of `ops.key_density`."""
    expect(keys, "keys", "BHND", None, keys.device)
    expect(valid, "valid", tuple(keys.shape[:3]), torch.bool, keys.device)
    if not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}; give a number above 0.")
    if not 0 <= lower <= 1:
        raise ValueError(f"lower is {lower}; give a number from 0 to 1.")
    if priority is not None:
        expect(priority, "priority", tuple(valid.shape), torch.float32, keys.device)
    elif lower < 1:
        raise ValueError(f"lower is {lower} and there is no priority; give one, or leave lower out.")


def top_k(scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor, **_: Any) -> None:
    """Check the arguments of `ops.top_k`."""
    expect(scores, "scores", "BHN", torch.float32, scores.device)
    expect(counts, "counts", tuple(scores.shape[:2]), torch.int64, scores.device)
    for name, mask in (("protected", protected), ("valid", valid)):
        expect(mask, name, tuple(scores.shape), torch.bool, scores.device)


def compact(tensor: Tensor, kept: KeepIndices) -> None:
    """Check the arguments of `ops.compact`."""
    if tensor.dim() < 3:
        raise ValueError(f"tensor has shape {list(tensor.shape)}; give [B, H, capacity, ...].")
    columns = kept.indices.shape[-1]
    expect(kept.indices, "kept.indices", (*tensor.shape[:2], columns), torch.int64, tensor.device)
    if columns > tensor.shape[2]:
        raise ValueError(
            f"kept.indices has {columns} columns but the storage holds {tensor.shape[2]} slots; keep fewer."
        )


def ragged_attention(
    queries: Tensor, base: Any, tail_keys: Tensor, tail_values: Tensor, visible: Tensor | None,
    *, attention_sinks: Tensor | None = None, **_: Any,
) -> None:  # fmt: skip
    """Check the arguments of `ops.ragged_attention`."""
    device, dtype = queries.device, tail_keys.dtype
    expect(queries, "queries", "BHqD", None, device)
    expect(tail_keys, "tail_keys", "BHTD", None, device)
    expect(tail_values, "tail_values", "BHTD", dtype, device)
    batch, query_heads, count, dim = queries.shape
    heads, tail = tail_keys.shape[1:3]
    expect(tail_keys, "tail_keys", (batch, heads, tail, dim), dtype, device)
    expect(tail_values, "tail_values", (batch, heads, tail, tail_values.shape[3]), dtype, device)
    if heads == 0 or query_heads % heads:
        raise ValueError(f"queries has {query_heads} heads, which is no multiple of the {heads} KV heads; give G * H.")
    blocks, slots = base.keys.shape[:2]
    expect(base.keys, "base.keys", (blocks, slots, dim), dtype, device)
    expect(base.values, "base.values", (blocks, slots, tail_values.shape[3]), dtype, device)
    for name in ("owner", "filled"):
        expect(getattr(base, name), f"base.{name}", (blocks,), torch.int64, device)
    if visible is not None and visible.shape[2:] != (count, tail):
        raise ValueError(f"visible has shape {list(visible.shape)}; give [B or 1, H or 1, {count}, {tail}].")
    if attention_sinks is not None:
        expect(attention_sinks, "attention_sinks", (heads, query_heads // heads), None, device)
