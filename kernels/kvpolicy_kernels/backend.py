"""The backend ``triton``. Importing this module does not import triton."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor

from kvpolicy.contracts.backend import Backend
from kvpolicy_kernels import served
from kvpolicy_kernels.launching import unavailable

_MODULES: Final = {
    "window_importance": "window",
    "redundancy": "similarity",
    "mean_similarity": "similarity",
    "mean_key_similarity": "similarity",
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
        return unavailable(keys) or served.dtype(keys) or served.head_dim(keys)

    def refuses(self, op: str, /, *args: Any, **kwargs: Any) -> str | None:
        """Say which argument or option is not supported."""
        first = args[0] if args else next(iter(kwargs.values()))
        check: Callable[..., str | None] = getattr(served, op)
        return unavailable(first) or check(*args, **kwargs)
