"""What the Triton kernels can serve, in one place. Importing this module does not import triton."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor

from kvpolicy.ops.dispatch import Backend
from kvpolicy_kernels._launch import interpreting

HEAD_DIMS: Final = (16, 32, 64, 128)
MOST_QUERIES: Final = 64
MOST_GROUP: Final = 16
MOST_BETA: Final = 4

_INSTEAD: Final = "write backend: auto or backend: torch"
_MODULES: Final = {
    "window_importance": "window",
    "redundancy": "similarity",
    "mean_similarity": "similarity",
    "top_k": "selection",
    "compact": "compaction",
    "ragged_attention": "ragged",
}


class TritonBackend(Backend):
    """Kernels for CUDA and HIP devices, and Triton's interpreter for tests."""

    def load(self, op: str) -> Callable[..., Any] | None:
        """Return the launcher of an operation."""
        module = _MODULES.get(op)
        return None if module is None else getattr(importlib.import_module(f"kvpolicy_kernels.{module}"), op)

    def refuses_cache(self, keys: Tensor) -> str | None:
        """Say what about device, dtype or head dim is not supported."""
        return _device(keys) or _dtype(keys) or _dim(keys)

    def refuses(self, op: str, /, *args: Any, **kwargs: Any) -> str | None:
        """Say which argument or option is not supported."""
        first = args[0] if args else next(iter(kwargs.values()))
        check: Callable[..., str | None] = getattr(self, f"_{op}")
        return _device(first) or check(*args, **kwargs)

    @staticmethod
    def _window_importance(
        queries: Tensor, query_positions: Tensor, query_valid: Tensor, keys: Tensor, positions: Tensor, valid: Tensor,
        *, softcap: float | None = None, attention_sinks: Tensor | None = None,
        smooth: int = 7, smooth_kind: str = "max", smooth_stage: str = "mean", **_: Any,
    ) -> str | None:  # fmt: skip
        options = {
            "the model's logit soft-cap": softcap is not None,
            "the model's attention sinks": attention_sinks is not None,
            f"smooth_kind: {smooth_kind}": smooth > 1 and smooth_kind != "max",
            f"smooth_stage: {smooth_stage}": smooth > 1 and smooth_stage != "mean",
            f"{queries.shape[3]} observed queries (at most {MOST_QUERIES})": queries.shape[3] > MOST_QUERIES,
            f"{queries.shape[2]} query heads per KV head (at most {MOST_GROUP})": queries.shape[2] > MOST_GROUP,
            f"{queries.dtype} queries with {keys.dtype} keys": queries.dtype != keys.dtype,
            "queries whose head dim is not contiguous": queries.stride(-1) != 1 and queries.numel() > 0,
        }
        return _first(options) or _keys(keys)

    @staticmethod
    def _redundancy(keys: Tensor, valid: Tensor, *, beta: int = 1, **_: Any) -> str | None:
        return _first({f"beta: {beta} (at most {MOST_BETA})": beta > MOST_BETA}) or _keys(keys)

    _mean_similarity = _redundancy

    @staticmethod
    def _top_k(*_: Any, **__: Any) -> str | None:
        return None

    @staticmethod
    def _compact(tensor: Tensor, kept: Any) -> str | None:
        from kvpolicy_kernels.compaction import refuses

        return refuses(tensor)

    @staticmethod
    def _ragged_attention(
        queries: Tensor, base: Any, tail_keys: Tensor, tail_values: Tensor, visible: Tensor | None,
        *, softcap: float | None = None, **_: Any,
    ) -> str | None:  # fmt: skip
        options = {
            "the model's logit soft-cap": softcap is not None,
            f"{queries.dtype} queries with {tail_keys.dtype} keys": queries.dtype != tail_keys.dtype,
            "queries whose head dim is not contiguous": queries.stride(-1) != 1,
            "blocks that are not contiguous": not (base.keys.is_contiguous() and base.values.is_contiguous()),
        }
        return _first(options) or _keys(tail_keys) or _keys(tail_values)


def _first(options: dict[str, bool]) -> str | None:
    wrong = next((name for name, used in options.items() if used), None)
    return None if wrong is None else f"there is no kernel for {wrong}; {_INSTEAD}"


def _device(tensor: Tensor) -> str | None:
    if find_spec("triton") is None:
        return f"triton is not installed; install kvpolicy[triton], or {_INSTEAD}"
    device = tensor.device
    if device.type == "cpu" and not interpreting():
        return (
            f"the cache is on the CPU; {_INSTEAD}, or set TRITON_INTERPRET=1 before Python starts to run the kernels "
            "in Triton's interpreter, slowly"
        )
    if device.type not in ("cpu", "cuda"):
        return f"the cache is on {device.type}, not on a CUDA or HIP device; {_INSTEAD}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"the GPU is older than compute capability 8.0; {_INSTEAD}"
    return None


def _dtype(keys: Tensor) -> str | None:
    if keys.dtype in (torch.float16, torch.bfloat16) or (keys.dtype == torch.float32 and keys.device.type == "cpu"):
        return None
    # fp32 products bypass the matrix instructions and spill; torch is faster.
    return f"the cache is {keys.dtype} and the kernels are for float16 and bfloat16; {_INSTEAD}"


def _dim(keys: Tensor) -> str | None:
    if keys.shape[-1] in HEAD_DIMS:
        return None
    return f"the head dim is {keys.shape[-1]} and the kernels are for {', '.join(map(str, HEAD_DIMS))}; {_INSTEAD}"


def _keys(keys: Tensor) -> str | None:
    """Check the keys that a kernel reads."""
    wrong = _dtype(keys) or _dim(keys)
    if wrong is None and keys.numel() > 0 and keys.stride(-1) != 1:
        wrong = f"the keys have strides {list(keys.stride())} and the head dim must be contiguous; {_INSTEAD}"
    # Offsets within a head are 32-bit.
    if wrong is None and keys.shape[2] * max(abs(keys.stride(2)), keys.shape[3]) >= 2**31:
        wrong = f"the keys of one head span more than 2**31 elements; {_INSTEAD}"
    return wrong
