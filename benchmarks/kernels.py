"""GB/s and TFLOP/s of the Triton kernels on a GPU, beside its roofline: ``python -P benchmarks/kernels.py``."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.ops.ragged import Blocks
from kvpolicy.types import KeepIndices

# Vendors' figures: memory in GB/s, half-precision matrix products (dense) in TFLOP/s.
PEAKS: Final = {
    "A100": (2039, 312),
    "H100": (3350, 989),
    "H200": (4800, 989),
    "B200": (8000, 2250),
    "MI300X": (5300, 1307),
}


@dataclass(frozen=True)
class Row:
    """One measured operation.

    Attributes:
        operation, keys: what ran, over how many keys per head.
        microseconds, spread: median of the runs, and the distance of the quartiles.
        gigabytes_per_second, teraflops: the least traffic and arithmetic the operation needs, over the median.
        roofline: share of the time that the roofline allows, or None on a GPU whose peaks are not known.
    """

    operation: str
    keys: int
    microseconds: float
    spread: float
    gigabytes_per_second: float
    teraflops: float
    roofline: float | None


def measured(run: Callable[[], object], repeats: int) -> list[float]:
    """Return microseconds of each run; the first runs compile."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return times


def cases(
    rows: int, heads: int, n: int, dim: int, device: torch.device
) -> dict[str, tuple[Callable[[], object], float, float]]:
    """Return for each operation the call, its bytes and its floating-point operations."""
    group, observe = 4, 8
    keep = n - 128

    def half(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    keys = half(rows, heads, 1, dim) + half(rows, heads, n, dim)
    values, queries = half(rows, heads, n, dim), half(rows, heads, group, observe, dim)
    positions = torch.arange(n, dtype=torch.int32, device=device).expand(rows, heads, n)
    at = positions[:, 0, -observe:].contiguous()
    asked = torch.ones(rows, observe, dtype=torch.bool, device=device)
    valid = torch.ones(rows, heads, n, dtype=torch.bool, device=device)
    scores = torch.rand(rows, heads, n, device=device)
    counts = torch.full((rows, heads), keep, device=device)
    kept = KeepIndices(torch.rand(rows, heads, n, device=device).argsort(-1)[..., :keep].sort(-1).values, counts)
    slots = rows * heads * n
    size = slots * dim * 2
    blocks = Blocks(
        keys.view(-1, 16, dim), values.view(-1, 16, dim),
        torch.arange(rows * heads, device=device).repeat_interleave(n // 16),
        torch.full((slots // 16,), 16, device=device),
    )  # fmt: skip
    tail, asking = half(rows, heads, 64, dim), half(rows, heads * group, 1, dim)
    scale = dim**-0.5
    return {
        "window_importance": (
            lambda: ops.window_importance(queries, at, asked, keys, positions, valid, scale=scale),
            size + slots * 8 * observe, 2.0 * slots * dim * group * observe,
        ),
        # The scan ends early, so its arithmetic depends on the keys: only the closed form is counted.
        "redundancy": (lambda: ops.redundancy(keys, valid), 2 * size + 28 * slots, 6.0 * slots * dim),
        "top_k": (lambda: ops.top_k(scores, counts, ~valid, valid, width=keep), slots * 6 + 8 * slots, 0.0),
        "compact keys": (lambda: ops.compact(keys, kept), 2 * size * keep / n, 0.0),
        "ragged_attention": (
            lambda: ops.ragged_attention(asking, blocks, tail, tail, None, scale=scale),
            2.0 * size, 4.0 * slots * dim * group,
        ),
    }  # fmt: skip


def main() -> int:
    """Measure and print; `--json` also writes the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32, help="batch rows times layers")
    parser.add_argument("--heads", type=int, default=8, help="KV heads")
    parser.add_argument("--dim", type=int, default=128, help="head dim")
    parser.add_argument("--keys", type=int, nargs="+", default=[1152, 4224], help="keys per head, multiples of 16")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py measures on a CUDA or HIP device, and there is none here.", file=sys.stderr)
        return 2
    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    memory, matrix = next((peaks for key, peaks in PEAKS.items() if key in name), (0, 0))
    print(f"{name}: {memory or 'unknown'} GB/s, {matrix or 'unknown'} TFLOP/s at most")
    print("operation          keys  microseconds  spread    GB/s  TFLOP/s  of the roofline")
    rows = []
    for n in options.keys:
        for operation, (run, moved, flops) in cases(options.rows, options.heads, n, options.dim, device).items():
            with ops.using_backend("triton"):
                times = measured(run, options.repeats)
            quartiles = statistics.quantiles(times, n=4)
            median = quartiles[1]
            least = max(moved / (memory * 1e3), flops / (matrix * 1e6)) if memory else None
            row = Row(
                operation, n, median, quartiles[2] - quartiles[0], moved / median / 1e3, flops / median / 1e6,
                None if least is None else least / median,
            )  # fmt: skip
            share = "-" if row.roofline is None else f"{row.roofline:.0%}"
            print(
                f"{operation:17} {n:5} {median:13.1f} {row.spread:7.1f} {row.gigabytes_per_second:7.0f} "
                f"{row.teraflops:8.1f} {share:>16}"
            )
            rows.append(row)
    if options.json is not None:
        report = {"device": name, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
