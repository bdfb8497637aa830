"""The backend ``triton``. Importing this module does not import triton."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor

from kvpolicy.contracts.backend import Backend
from kvpolicy_kernels import served
from kvpolicy_kernels._launch import interpreting
from kvpolicy_kernels.served import INSTEAD

_MODULES: Final = {
    "window_importance": "window",
    "redundancy": "similarity",
    "mean_similarity": "similarity",
    "key_density": "density",
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
        return _device(keys) or served.dtype(keys) or served.head_dim(keys)

    def refuses(self, op: str, /, *args: Any, **kwargs: Any) -> str | None:
        """Say which argument or option is not supported."""
        first = args[0] if args else next(iter(kwargs.values()))
        check: Callable[..., str | None] = getattr(served, op)
        return _device(first) or check(*args, **kwargs)


def _installed() -> bool:
    try:
        return find_spec("triton") is not None
    except ValueError:  # what an import that was turned off leaves behind
        return False


def _device(tensor: Tensor) -> str | None:
    if not _installed():
        return f"triton is not installed; install kvpolicy[triton], or {INSTEAD}"
    device = tensor.device
    if device.type == "cpu" and not interpreting():
        return (
            f"the cache is on the CPU; {INSTEAD}, or set TRITON_INTERPRET=1 before Python starts to run the kernels "
            "in Triton's interpreter, slowly"
        )
    if device.type not in ("cpu", "cuda"):
        return f"the cache is on {device.type}, not on a CUDA or HIP device; {INSTEAD}"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"the GPU is older than compute capability 8.0; {INSTEAD}"
    return None
