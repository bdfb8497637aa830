"""Launching kernels, of this package or of a plugin: what launchers share. Importing this does not import triton."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Final, Protocol

import torch
from torch import Tensor

INSTEAD: Final = "write backend: auto or backend: torch"
"""What every refusal ends with."""
WORKSPACE_BYTES = 64 << 20
"""What one launch may hold beside its results; a larger batch is cut into several launches."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as a recorder sees it.

    Attributes:
        package: dotted name of the package that the kernel's module lies in.
        name: ``module.kernel``.
        arguments: positional arguments.
        constants: compile-time arguments.
        warps: warps per program.
        stages: of a software pipeline; 1 for none.
    """

    package: str
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


def unavailable(tensor: Tensor) -> str | None:
    """Say why no kernel can run where a tensor lies (a clause without a full stop), or return None."""
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


def _installed() -> bool:
    try:
        return find_spec("triton") is not None
    except ValueError:  # what an import that was turned off leaves behind
        return False


def upcast() -> bool:
    """Whether operands of matrix products have to be widened: the interpreter cannot multiply bf16."""
    return _recorder.get() is None and interpreting()


@cache
def kernel(package: str, name: str) -> Any:
    """Return the kernel ``module.kernel`` of a package; this imports triton."""
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(f"{package}.{module}"), function)


class Launcher(Protocol):
    """Runs kernels of one package."""

    def __call__(
        self, name: str, programs: int, *arguments: Any, warps: int = 4, stages: int = 1, **constants: Any
    ) -> None:
        """Run `programs` programs of the kernel ``module.kernel`` on the device of the first argument, a tensor.

        Without a software pipeline (`stages` above 1) no load is moved before a store of an earlier round of a loop.
        """


def launcher(package: str) -> Launcher:
    """Return what launches the kernels of a package; its modules are imported at the first launch of one of theirs."""

    def launch(name: str, programs: int, *arguments: Any, warps: int = 4, stages: int = 1, **constants: Any) -> None:
        record = _recorder.get()
        if record is not None:
            record(Launch(package, name, arguments, constants, warps, stages))
            return
        if programs == 0:
            return
        device = arguments[0].device
        run = kernel(package, name)[(programs,)]
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            run(*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)

    return launch


launch = launcher("kvpolicy_kernels._triton")


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
