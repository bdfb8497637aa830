"""Which options and layouts have a kernel, in one place: each function says why a call has none, or returns None."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from kvpolicy.errors import UnsupportedError
from kvpolicy_kernels.launching import INSTEAD

HEAD_DIMS: Final = (16, 32, 64, 96, 128, 192, 256)
MOST_QUERIES: Final = 32  # more would spill registers
MOST_GROUP: Final = 16
MOST_BETA: Final = 4


def require(reason: str | None) -> None:
    """Raise UnsupportedError if there is a reason."""
    if reason is not None:
        raise UnsupportedError(f"backend: triton cannot run this, because {reason}.")


def window_importance(
    queries: Tensor, query_positions: Tensor, query_valid: Tensor, keys: Tensor, positions: Tensor, valid: Tensor,
    **_: Any,
) -> str | None:  # fmt: skip
    """Importance with all options, for a window and a group of limited size."""
    options = {
        f"{queries.shape[3]} observed queries (at most {MOST_QUERIES})": queries.shape[3] > MOST_QUERIES,
        f"{queries.shape[2]} query heads per KV head (at most {MOST_GROUP})": queries.shape[2] > MOST_GROUP,
        f"{queries.dtype} queries with {keys.dtype} keys": queries.dtype != keys.dtype,
        "queries whose head dim is not contiguous": queries.stride(-1) != 1 and queries.numel() > 0,
    }
    return _first(options) or _layout(keys)


def redundancy(keys: Tensor, valid: Tensor, *, beta: int = 1, **_: Any) -> str | None:
    """Redundancy with all options, for a few exemptions per key."""
    return _first({f"beta: {beta} (at most {MOST_BETA})": beta > MOST_BETA}) or _layout(keys)


def mean_similarity(keys: Tensor, takes_part: Tensor, **options: Any) -> str | None:
    """As `redundancy`."""
    return redundancy(keys, takes_part, **options)


def mean_key_similarity(keys: Tensor, takes_part: Tensor, **_: Any) -> str | None:
    """All options."""
    return _layout(keys)


def key_density(keys: Tensor, valid: Tensor, **_: Any) -> str | None:
    """Keys of any floating-point dtype: without their rotary embedding they are fp32."""
    return head_dim(keys) or _strides(keys)


def top_k(*_: Any, **__: Any) -> str | None:
    """Everything."""
    return None


def compact(tensor: Tensor, kept: Any) -> str | None:
    """Storages whose slots are contiguous."""
    from kvpolicy_kernels.compaction import as_words

    return None if as_words(tensor) is not None else f"the slots of a storage are not contiguous; {INSTEAD}"


def ragged_attention(
    queries: Tensor, base: Any, tail_keys: Tensor, tail_values: Tensor, visible: Tensor | None,
    **_: Any,
) -> str | None:  # fmt: skip
    """Decode attention with all options."""
    options = {
        f"{queries.dtype} queries with {tail_keys.dtype} keys": queries.dtype != tail_keys.dtype,
        "queries whose head dim is not contiguous": queries.stride(-1) != 1,
        "blocks that are not contiguous": not (base.keys.is_contiguous() and base.values.is_contiguous()),
    }
    return _first(options) or _layout(tail_keys) or _layout(tail_values)


def dtype(keys: Tensor) -> str | None:
    """Half precision; fp32 in the interpreter, on the CPU."""
    if keys.dtype in (torch.float16, torch.bfloat16) or (keys.dtype == torch.float32 and keys.device.type == "cpu"):
        return None
    # fp32 products bypass the matrix instructions and spill; torch is faster.
    return f"the cache is {keys.dtype} and the kernels are for float16 and bfloat16; {INSTEAD}"


def head_dim(keys: Tensor) -> str | None:
    """Those that were compiled ahead of time."""
    if keys.shape[-1] in HEAD_DIMS:
        return None
    return f"the head dim is {keys.shape[-1]} and the kernels are for {', '.join(map(str, HEAD_DIMS))}; {INSTEAD}"


def _first(options: dict[str, bool]) -> str | None:
    wrong = next((name for name, used in options.items() if used), None)
    return None if wrong is None else f"there is no kernel for {wrong}; {INSTEAD}"


def _layout(keys: Tensor) -> str | None:
    return dtype(keys) or head_dim(keys) or _strides(keys)


def _strides(keys: Tensor) -> str | None:
    wrong = None
    if keys.numel() > 0 and keys.stride(-1) != 1:
        wrong = f"the keys have strides {list(keys.stride())} and the head dim must be contiguous; {INSTEAD}"
    # Offsets within a head are 32-bit.
    if wrong is None and keys.shape[2] * max(abs(keys.stride(2)), keys.shape[3]) >= 2**31:
        wrong = f"the keys of one head span more than 2**31 elements; {INSTEAD}"
    return wrong
