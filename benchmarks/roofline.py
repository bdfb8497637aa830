"""What the operations of R-KV must move and compute, and the least time that takes on some devices.

Bytes and floating-point operations are counted from the shapes: inputs read once, outputs written once. Only one number
is measured: the share of all pairs of keys that the search for similar ones visits before it ends early, on the keys
that SmolLM2 caches for this project's own text. Times for GPUs are estimates from the vendors' figures and nothing was
run on one; bandwidth and arithmetic of this CPU are measured by short probes.

    python -P benchmarks/roofline.py --quick
    python -P benchmarks/roofline.py --json roofline.json
    python -P benchmarks/roofline.py --batch 1 --layers 36 --heads 8 --group 4 --dim 128
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_HERE = Path(__file__).resolve().parent  # not itself on the path: kernels.py would pass for the PyPI package
sys.path[:] = [str(_HERE / "shared"), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

from kvbench import measuring, real
from kvbench.measuring import Spread, timed
from kvpolicy import ops
from kvpolicy.cli.devices import gpu_of
from kvpolicy.contracts.view import CacheView

OBSERVED, THRESHOLD, TILE = 8, 0.5, 64


@dataclass(frozen=True)
class Device:
    """What a device can do at most.

    Attributes:
        name: for the table.
        bandwidth: bytes per second from its memory.
        arithmetic: floating-point operations per second of matrix products.
        element: bytes of a cached number.
        estimated: whether the figures are a vendor's, and times therefore estimates.
    """

    name: str
    bandwidth: float
    arithmetic: float
    element: int
    estimated: bool


GPUS = [
    Device(gpu.name, gpu.bandwidth, gpu.arithmetic, 2, True)
    for gpu in map(gpu_of, ("A100 80GB SXM", "H100 SXM", "MI300X"))
]


@dataclass(frozen=True)
class Shape:
    """A model's caches: rows of the batch, layers, KV heads, query heads per KV head, head dim."""

    batch: int
    layers: int
    heads: int
    group: int
    dim: int

    @property
    def rows(self) -> int:
        """KV heads of all layers and rows."""
        return self.batch * self.layers * self.heads


@dataclass(frozen=True)
class Work:
    """What an operation moves and computes, for all layers and rows."""

    operation: str
    bytes: float
    flops: float

    def seconds(self, device: Device) -> float:
        """Return the least time: memory and arithmetic at their peaks, one hiding behind the other."""
        return max(self.bytes / device.bandwidth, self.flops / device.arithmetic)


def operations(shape: Shape, n: int, keep: int, share: float, element: int) -> list[Work]:
    """Count one compression of `n` entries to `keep`, and one decode step between two of them.

    Args:
        shape: the model's caches.
        n, keep: entries per head before and after.
        share: of all `n * n` pairs of keys, those that the search visits.
        element: bytes of a cached number; scores have 4, indices 8, positions 4.
    """
    keys = n * shape.dim * element
    between = (n + keep) / 2
    counted = {
        # Keys once; logits of the observed queries, reduced over the group, written and read; scores written.
        "importance": (keys + 2 * 4 * n * OBSERVED + 4 * n, 2 * n * shape.dim * shape.group * OBSERVED),
        # Keys for norms and their sum, keys again for the product with the sum; inverse norms; scores.
        "redundancy: closed form": (2 * keys + 2 * 4 * n + 4 * n, 6 * n * shape.dim),
        # The keys that are searched lie in caches; the corrections are integers of 8 bytes.
        "redundancy: search": (keys + 2 * 8 * n, 2 * share * n * n * shape.dim),
        "selection": (2 * 4 * n + 8 * keep, 4 * n),
        "compaction": (2 * (2 * keep * shape.dim * element) + 2 * 4 * keep + 8 * keep, 0),
        # For comparison. Cosines written and read for mask and mean; mask; zeros, column numbers and maximum in int64.
        "redundancy, n x n in memory": (keys + n * n * (3 * element + 1 + 1 + 4 * 8), 2 * n * n * shape.dim),
        "decode attention, one step": (2 * between * shape.dim * element, 4 * between * shape.dim * shape.group),
    }
    return [Work(name, shape.rows * moved, shape.rows * flops) for name, (moved, flops) in counted.items()]


OURS = ("importance", "redundancy: closed form", "redundancy: search", "selection", "compaction")


def visited_by_torch(view: CacheView) -> float:
    """Return the share of all pairs whose similarity the plain-torch search computes, from counted products."""

    def flops(beta: int) -> int:
        with FlopCounterMode(display=False) as counter:
            ops.mean_similarity(view.keys, view.valid, threshold=THRESHOLD, beta=beta)
        return int(counter.get_total_flops())

    pairs = view.keys.shape[:2].numel() * view.keys.shape[2] ** 2
    return (flops(1) - flops(0)) / (2 * view.keys.shape[3] * pairs)


def visited_by_tiles(view: CacheView) -> float:
    """Return the share of all pairs that a kernel visits: rows in tiles, column tiles from the newest backwards.

    A row tile ends at the column tile in which the last of its rows finds a similar key.
    """
    keys = torch.nn.functional.normalize(view.keys.flatten(0, 1).float(), dim=-1)
    heads, n, _ = keys.shape
    tiles = -(-n // TILE)
    visited = 0
    numbers = torch.arange(n)
    for first in range(0, n, TILE):
        rows = numbers[first : first + TILE]
        similar = keys[:, first : first + TILE] @ keys.transpose(1, 2) > THRESHOLD
        similar[:, torch.arange(len(rows)), rows] = False
        newest = torch.where(similar, numbers, 0).amax(-1)
        visited += int((tiles - newest.amin(-1) // TILE).sum())
    return visited / (heads * tiles**2)


def this_cpu(megabytes: int, side: int) -> Device:
    """Measure copying between two arrays, and a product of two square matrices in fp32."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    left, right = torch.randn(side, side), torch.randn(side, side)
    target.copy_(source)
    left @ right
    copying = min(timed(lambda: target.copy_(source)).wall for _ in range(5))
    product = min(timed(lambda: left @ right).wall for _ in range(5))
    threads = torch.get_num_threads()
    name = f"this CPU, {threads} thread{'s' if threads > 1 else ''}"
    return Device(name, 2 * source.numel() * 4 / copying, 2 * side**3 / product, 4, False)


def measured_shares(counts: list[int], layers: int | None) -> dict[int, dict[str, Spread]]:
    """Return the visited shares over the layers of SmolLM2, by number of keys and by form of the search."""
    model = real.load_model()
    shares = {}
    for count in counts:
        with torch.no_grad(), real.due_cache(model, count) as cache:
            views = real.views_of(cache)
            some = views[:: max(1, len(views) // (layers or len(views)))]
            shares[count] = {
                "torch": Spread.of([visited_by_torch(view) for view in some]),
                "tiles": Spread.of([visited_by_tiles(view) for view in some]),
            }
    return shares


def rows_for(
    shape: Shape, devices: list[Device], n: int, interval: int, share: dict[str, Spread]
) -> list[dict[str, Any]]:
    """Return what each operation takes on each device at the least, and the compression's share of decoding."""
    found = []
    for device in devices:
        visited = share["tiles" if device.estimated else "torch"].median
        works = {w.operation: w for w in operations(shape, n, n - interval, visited, device.element)}
        ours = sum(works[name].seconds(device) for name in OURS)
        attention = interval * works["decode attention, one step"].seconds(device)
        found.append({
            "device": device.name,
            "estimate": device.estimated,
            "keys": n,
            "visited_share": visited,
            "bytes": {name: work.bytes for name, work in works.items()},
            "flops": {name: work.flops for name, work in works.items()},
            "seconds": {name: work.seconds(device) for name, work in works.items()},
            "compression_seconds": ours,
            "share_of_attention_between_compressions": ours / attention,
        })  # fmt: skip
    return found


def report(
    shape: Shape, devices: list[Device], results: list[dict[str, Any]], shares: dict[int, Any], interval: int
) -> None:
    """Print the peaks, what was measured, and the operations."""
    measuring.show(
        "Peaks",
        ["device", "GB/s", "TFLOP/s", "from"],
        [
            [
                d.name,
                f"{d.bandwidth / 1e9:.0f}",
                f"{d.arithmetic / 1e12:.2f}",
                "data sheet" if d.estimated else "measured",
            ]
            for d in devices
        ],
    )
    measuring.show(
        "Pairs of keys that the search visits before it ends early (SmolLM2, this project's text)",
        ["keys", "plain torch", f"tiles of {TILE} x {TILE}"],
        [[n, share["torch"].text(".1%"), share["tiles"].text(".1%")] for n, share in shares.items()],
        "Median [quartiles] over layers.",
    )
    caches = (
        f"batch {shape.batch}, {shape.layers} layers, {shape.heads} KV heads x {shape.group} query heads, D {shape.dim}"
    )
    for n in shares:
        some = [r for r in results if r["keys"] == n]
        names = list(some[0]["seconds"])
        heads = [f"{r['device']}{', estimate' if r['estimate'] else ''}" for r in some]
        lines = [
            [name, *(f"{r['bytes'][name] / 1e6:.0f} / {r['flops'][name] / 1e9:.1f}" for r in (some[0], some[-1])),
             *(f"{1e6 * r['seconds'][name]:.0f}" for r in some)]
            for name in names
        ]  # fmt: skip
        lines.append(["whole compression", "", "", *(f"{1e6 * r['compression_seconds']:.0f}" for r in some)])
        parts = [f"{r['share_of_attention_between_compressions']:.1%}" for r in some]
        lines.append([f"of the attention of {interval} steps", "", "", *parts])
        measuring.show(
            f"{n} keys per head to {n - interval}: {caches}",
            ["operation", "MB / GFLOP in bf16", "in fp32", *(f"{head}, us" for head in heads)],
            lines,
            "Microseconds at the device's peaks, launches not counted: no implementation is faster. GPUs hold bf16, "
            "the CPU fp32. Columns marked estimate were computed, not measured.",
        )


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; `--quick` replaces the sizes. The default shape is that of Llama-3.1-8B at batch 32."""
    parser = measuring.arguments(__doc__)
    parser.add_argument(
        "--keys", type=int, nargs="+", default=[1152, 4224], help="entries per head before a compression"
    )
    parser.add_argument("--interval", type=int, default=128, help="tokens between two compressions")
    for name, value in {"batch": 32, "layers": 32, "heads": 8, "group": 4, "dim": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="shape of the caches (default: %(default)s)")
    parser.add_argument("--measured-layers", type=int, help="measure the share on so many layers only")
    parser.add_argument("--probe", type=int, nargs=2, default=[256, 2048], help="MB to copy, and side of the matrices")
    options = parser.parse_args(argv)
    if options.quick:
        options.keys, options.measured_layers, options.probe = [192], 2, [4, 128]
    return options


def main(argv: list[str] | None = None) -> None:
    """Count, probe, print tables, and write JSON when asked."""
    options = parsed(argv)
    torch.set_num_threads(options.threads)
    shape = Shape(options.batch, options.layers, options.heads, options.group, options.dim)
    shares = measured_shares(options.keys, options.measured_layers)
    devices = [*GPUS, this_cpu(*options.probe)]
    results = [row for n in options.keys for row in rows_for(shape, devices, n, options.interval, shares[n])]
    report(shape, devices, results, shares, options.interval)
    measuring.write(options, "roofline", {"devices": devices, "visited_shares": shares, "results": results})


if __name__ == "__main__":
    main()
