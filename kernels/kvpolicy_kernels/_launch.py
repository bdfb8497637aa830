"""Launching kernels: what all launchers share. Importing this module does not import triton."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

WORKSPACE_BYTES = 64 << 20
"""What one launch may hold beside its results; a larger batch is cut into several launches."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as a recorder sees it.

    Attributes:
        name: ``module.kernel``.
        arguments: positional arguments.
        constants: compile-time arguments.
        warps: warps per program.
        stages: of a software pipeline; 1 for none.
    """

    name: str
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


_recorder: ContextVar[Callable[[Launch], None] | None] = ContextVar("kvpolicy_recorder", default=None)


@contextmanager
def recording(recorder: Callable[[Launch], None]) -> Iterator[None]:
    """Hand every launch to `recorder` instead of a device.

    Results of the launchers are uninitialised memory; this is how the ahead-of-time compiler learns what to compile.
    """
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which has to be asked for before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def upcast() -> bool:
    """Whether operands of matrix products have to be widened: the interpreter cannot multiply bf16."""
    return _recorder.get() is None and interpreting()


@cache
def kernel(name: str) -> Any:
    """Return the kernel ``module.kernel``; this imports triton."""
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(f"kvpolicy_kernels._triton.{module}"), function)


def launch(name: str, programs: int, *arguments: Any, warps: int = 4, stages: int = 1, **constants: Any) -> None:
    """Run `programs` programs of the kernel ``module.kernel`` on the device of the first argument.

    Without a software pipeline (`stages` above 1) no load is moved before a store of an earlier round of a loop.
    """
    record = _recorder.get()
    if record is not None:
        record(Launch(name, arguments, constants, warps, stages))
        return
    if programs == 0:
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel(name)[(programs,)](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def batches(batch: int, bytes_each: int) -> Iterator[slice]:
    """Cut a batch so that no piece needs more than the workspace."""
    step = max(1, WORKSPACE_BYTES // max(1, bytes_each))
    for start in range(0, batch, step):
        yield slice(start, min(start + step, batch))


def as_bytes(mask: Tensor) -> Tensor:
    """Return a bool tensor's own bytes: the interpreter knows no arithmetic on pointers to single bits."""
    return mask.view(torch.uint8)


def padded(count: int, least: int = 16) -> int:
    """Return the power of two that holds `count`; a matrix instruction takes no fewer than 16 columns."""
    return max(least, 1 << max(0, count - 1).bit_length())


def parts_of(dim: int) -> tuple[int, int]:
    """Cut a head dim into equal parts whose width is a power of two: (width, parts); up to 128 one part, if it is one.

    Wider parts than 64 of a wide key would spill registers.
    """
    width = dim & -dim
    return (dim, 1) if width == dim and dim <= 128 else (min(64, width), dim // min(64, width))
