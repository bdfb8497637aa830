"""The Triton kernels on a GPU: time, bytes and operations, beside what the same device does at most.

Each operation runs as its kernel, as its plain-torch definition, as `torch.compile` makes of that, and, for scores of
pairs, in the literal keys x keys form in fp32, a row of a layer at a time as the methods' own code does. What the
device does at most is measured first: a copy, and a product of matrices in bf16.

    python -P benchmarks/kernels.py --json kernels.json
    TRITON_INTERPRET=1 python -P benchmarks/kernels.py --quick          # toy sizes, in the interpreter
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent  # not itself on the path: this file would pass for the PyPI package kernels
sys.path[:] = [str(_HERE / "shared"), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

import torch
from torch import Tensor

from kvbench import devices, literal, measuring
from kvbench.measuring import Spread
from kvpolicy import ops
from kvpolicy.ops.ragged import Blocks
from kvpolicy.types import KeepIndices

FORMS = ("triton", "literal", "torch", "torch.compile")
SECONDS = {"torch.compile": 20.0}  # a form takes at most, on a GPU of today; others 3
BANDWIDTH = 0.15


@dataclass(frozen=True)
class Case:
    """One operation on some keys.

    Attributes:
        op: its name in `kvpolicy.ops`.
        arguments, options: what it is called with.
        moved: the least bytes it must read and write.
        flops: the least floating-point operations, of the closed form.
        literal: its keys x keys form.
    """

    op: str
    arguments: tuple[Any, ...]
    moved: float
    flops: float
    options: dict[str, Any] = field(default_factory=dict)
    literal: Callable[[], object] | None = None

    def form(self, name: str, compiler: str) -> Callable[[], object] | None:
        """Return the operation in one of `FORMS`, None where it has no such form."""
        function = getattr(ops, self.op)
        if name == "literal":
            return self.literal
        if name == "torch.compile":
            function = torch.compile(function.__wrapped__, dynamic=False, backend=compiler)
        backend = "triton" if name == "triton" else "torch"

        def run() -> object:
            with ops.using_backend(backend):
                return function(*self.arguments, **self.options)

        return run


@dataclass
class Row:
    """One line.

    Attributes:
        operation, form, keys: what ran, how, over how many keys per head.
        outcome: `measured`, or a sentence.
        microseconds: of one call over all rows and heads.
        gigabytes_per_second, teraflops: the least traffic and arithmetic that the operation needs, over the median.
        of_copy, of_matrix: these as shares of the measured copy and matrix product.
    """

    operation: str
    form: str
    keys: int
    outcome: str = "measured"
    microseconds: Spread | None = None
    gigabytes_per_second: float | None = None
    teraflops: float | None = None
    of_copy: float | None = None
    of_matrix: float | None = None


def measured(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Return microseconds of each run, of a second of them at most; the first runs compile."""
    for _ in range(3 if device.type == "cuda" else 1):
        run()
    if device.type != "cuda":
        return [1e6 * devices.seconds(device, run) for _ in range(repeats)]
    times: list[float] = []
    while len(times) < repeats and (len(times) < 3 or sum(times) < 1e6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return times


def cases(rows: int, heads: int, n: int, dim: int, device: torch.device) -> dict[str, Case]:
    """Return for each operation what it is called with, and the work it cannot do without."""
    group, observe = 4, 8
    keep = n * 8 // 9

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

    def by_rows(form: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: [form(row.float()) for row in keys]

    return {
        "window_importance": Case(
            "window_importance", (queries, at, asked, keys, positions, valid), size + slots * 8 * observe,
            2.0 * slots * dim * group * observe, {"scale": scale},
        ),
        # The scan ends early, so its arithmetic depends on the keys: only the closed form is counted.
        "redundancy": Case(
            "redundancy", (keys, valid), 2 * size + 28 * slots, 6.0 * slots * dim,
            literal=by_rows(literal.released_redundancy),
        ),
        "key_density": Case(
            "key_density", (keys, valid), size + 4 * slots, 2.0 * slots * n * dim, {"bandwidth": BANDWIDTH},
            by_rows(lambda row: literal.density(row, BANDWIDTH)),
        ),
        "top_k": Case("top_k", (scores, counts, ~valid, valid), slots * 14, 0.0, {"width": keep}),
        "compact keys": Case("compact", (keys.clone(), kept), 2 * size * keep / n, 0.0),
        "ragged_attention": Case(
            "ragged_attention", (asking, blocks, tail, tail, None), 2.0 * size, 4.0 * slots * dim * group,
            {"scale": scale},
        ),
    }  # fmt: skip


def line(case: Case, row: Row, options: argparse.Namespace, device: torch.device, most: tuple[float, float]) -> Row:
    """Measure one operation in one form.

    Args:
        case: the operation.
        row: where the figures go.
        options: of the command line.
        device: where its tensors are.
        most: bytes and operations per second that the device does.
    """
    run = case.form(row.form, options.compiler)
    assert run is not None
    devices.forget_peak(device)
    try:
        row.microseconds = Spread.of(measured(run, options.repeats, device))
    except torch.OutOfMemoryError:
        row.outcome = "out of memory"
    except Exception as error:  # noqa: BLE001 - the other lines still count
        row.outcome = devices.failure(error)
    else:
        seconds = row.microseconds.median / 1e6
        row.gigabytes_per_second, row.teraflops = case.moved / seconds / 1e9, case.flops / seconds / 1e12
        row.of_copy, row.of_matrix = case.moved / seconds / most[0], case.flops / seconds / most[1]
    return row


def lines(
    options: argparse.Namespace, device: torch.device, deadline: devices.Deadline, most: tuple[float, float]
) -> Iterator[Row]:
    """Measure all kernels first, then what they are compared with."""
    for form in FORMS:
        for n in options.keys:
            torch.compiler.reset()
            for operation, case in cases(options.rows, options.heads, n, options.dim, device).items():
                if form == "literal" and case.literal is None:
                    continue
                late = deadline.refuses(SECONDS.get(form, 3.0) if device.type == "cuda" else 0.0)
                row = Row(operation, form, n)
                if late is not None:
                    row.outcome = late
                    yield row
                    continue
                yield line(case, row, options, device, most)


def text(row: Row) -> str:
    """Write a line."""
    head = f"{row.operation:17} {row.form:13} {row.keys:5} "
    if row.microseconds is None:
        return head + row.outcome
    return (
        f"{head} {row.microseconds.text('.1f')} us, {row.gigabytes_per_second:.0f} GB/s ({row.of_copy:.0%} of a copy), "
        f"{row.teraflops:.1f} TFLOP/s ({row.of_matrix:.0%} of a matrix product)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; `--json` has all lines so far. Returns 1 if one failed."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rows", type=int, default=32, help="batch rows times layers")
    parser.add_argument("--heads", type=int, default=8, help="KV heads")
    parser.add_argument("--dim", type=int, default=128, help="head dim")
    parser.add_argument("--keys", type=int, nargs="+", default=[1152, 4224], help="keys per head, multiples of 16")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument(
        "--until", type=float, help="begin no line that would not be done by then (as `date +%%s` says)"
    )
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    options = parser.parse_args(argv)
    copied, side = 4 << 30, 8192
    if options.quick:
        options.device, options.compiler, copied, side = "cpu", "eager", 1 << 20, 64
        options.rows, options.heads, options.dim, options.keys, options.repeats = 1, 1, 16, [80], 1
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/kernels.py measures on a CUDA or HIP device, and there is none here.", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    device, deadline = torch.device(options.device), devices.Deadline(options.until)
    most = devices.bandwidth(device, copied), devices.matrix_rate(device, side)
    on = devices.facts(device) | {"copy_bytes_per_second": most[0], "matrix_flops_per_second": most[1]}
    print(f"{on['device']}: a copy moves {most[0] / 1e9:.0f} GB/s, a bf16 product does {most[1] / 1e12:.1f} TFLOP/s")
    rows, failed = [], False
    for row in lines(options, device, deadline, most):
        rows.append(asdict(row))
        # What torch.compile cannot make of a definition is its own affair.
        failed |= row.outcome.startswith("failed") and row.form != "torch.compile"
        print(text(row), flush=True)
        measuring.write(options, "kernels", {"on": on, "rows": rows})
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
