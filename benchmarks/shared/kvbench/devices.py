"""Clocks and memory of a GPU; the CPU takes its place at toy sizes, where only the code is tried."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbench.measuring import machine


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, run: Callable[[], object]) -> float:
    """Return what a clock on the wall says, from an idle device to an idle device."""
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def forget_peak(device: torch.device) -> None:
    """Give back what nobody holds, and measure the most bytes anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes that were allocated since `forget_peak`, weights included; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def facts(device: torch.device) -> dict[str, Any]:
    """Say what was measured on."""
    if device.type != "cuda":
        return machine() | {"device": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return machine() | {
        "device": properties.name, "device_bytes": properties.total_memory,
        "cuda": torch.version.cuda or torch.version.hip,
    }  # fmt: skip


def failure(error: Exception) -> str:
    """Say in one line that something failed, and of what."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"failed: {type(error).__name__}{': ' if first else ''}{first[:300]}"


@dataclass
class Deadline:
    """The end of the time that a benchmark has, in seconds since 1970; without one it never comes."""

    until: float | None

    def refuses(self, need: float) -> str | None:
        """Say that so many seconds are not left, or return None."""
        left = need if self.until is None else self.until - time.time()
        if left >= need:
            return None
        return f"not run: it needs about {need:.0f} s and {max(0.0, left):.0f} s are left"


def bandwidth(device: torch.device, size: int) -> float:
    """Measure bytes per second, read and written, of a copy of `size` bytes: the median of 10."""
    here = torch.empty(size, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    return 2 * size / _median(device, lambda: there.copy_(here), 10)


def matrix_rate(device: torch.device, side: int) -> float:
    """Measure operations per second of a product of two random bf16 matrices of `side` rows: the median of 10."""
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return float(2 * side**3 / _median(device, lambda: a @ b, 10))


def _median(device: torch.device, run: Callable[[], Tensor], repeats: int) -> float:
    for _ in range(3):
        run()
    times = sorted(seconds(device, run) for _ in range(repeats))
    return times[len(times) // 2]
