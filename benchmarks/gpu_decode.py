"""Decoding on a GPU with random weights in the shape of a real model: what a policy gains over whole caches.

A row is filled once per cache and context by the model itself and then repeated to a batch. Step times are of steps
that compact nothing; a compaction is timed by itself, and tokens per second are those of a whole interval: its steps
and its one compaction. What needs more than `--memory`, more time than is left, or more memory than there is, is a
line that says so. `--batch 0` is as many rows as `--memory` holds.

    python -P benchmarks/gpu_decode.py --json decode.json
    python -P benchmarks/gpu_decode.py --shape qwen2-1.5b --context 8192 --batch 1 8
    python -P benchmarks/gpu_decode.py --quick                                # toy sizes, on the CPU
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent  # not itself on the path: kernels.py would pass for the PyPI package
sys.path[:] = [str(_HERE / "shared"), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from kvbench import devices, measuring
from kvbench.lanes import allocated_bytes, entry_bytes, interval_of, policy_with
from kvbench.measuring import Spread
from kvbench.shapes import SHAPES, random_model
from kvpolicy.runtimes.hf import PolicyCache

FULL, STATIC = "DynamicCache", "StaticCache, compiled"
POLICIES = ("rkv", "rkv-density", "snapkv")
WARM, BLOCKS = 2, 3
FED = 8192
"""Tokens of all rows that are fed at once: what they need for the moment stays small beside the caches."""
SECONDS, TO_COMPILE, A_TOKEN = 4.0, 60.0, 2e-4
"""What a line takes at most on a GPU of today, what is compiled more, and what filling takes per token of context."""


@dataclass
class Row:
    """One line.

    Attributes:
        cache, context, batch: what decoded, after how many tokens, how many rows.
        outcome: `measured`, or a sentence.
        tokens_per_second: of all rows, compactions included.
        step_ms: a step of one token per row that compacts nothing.
        compaction_ms: one compaction of all rows and layers.
        compaction_share: of an interval's time.
        peak_bytes: most bytes allocated at a time, weights included; None on a CPU.
        cache_bytes: of the cache's tensors.
    """

    cache: str
    context: int
    batch: int
    outcome: str
    tokens_per_second: float | None = None
    step_ms: Spread | None = None
    compaction_ms: Spread | None = None
    compaction_share: float | None = None
    peak_bytes: int | None = None
    cache_bytes: int | None = None


class Bench:
    """Measures lines on one model.

    Args:
        model: its weights and cache may take `options.memory` GB.
        options: of the command line.
        deadline: when to stop.
    """

    def __init__(self, model: PreTrainedModel, options: argparse.Namespace, deadline: devices.Deadline) -> None:
        self.model, self.options, self.deadline, self.device = model, options, deadline, model.device
        self.weights = sum(p.numel() * p.element_size() for p in model.parameters())
        self.layers = len(DynamicCache(config=model.config).layers)
        self.interval = interval_of(policy_with("rkv", options.budget, options.interval))

    def row_bytes(self, name: str, context: int) -> int:
        """Estimate the bytes of a row: its cache, one layer of it on the way, and its logits."""
        whole = context + self.steps + 8
        entries = {FULL: whole * (1 + 2 / self.layers), STATIC: float(whole)}.get(
            name, (self.options.budget + self.interval) * (1.05 + 8 / self.layers)
        )
        return int(entry_bytes(self.model) * entries) + 8 * self.model.config.vocab_size

    @property
    def steps(self) -> int:
        """Decode steps of a line."""
        return int(WARM + BLOCKS * self.options.tokens)

    def batch_of(self, name: str, context: int, asked: int) -> int:
        """Return the rows that were asked for, or for 0 as many as fit."""
        return asked or max(1, int((1e9 * self.options.memory - self.weights) // self.row_bytes(name, context)))

    @torch.no_grad()
    def line(self, name: str, context: int, asked: int, filled: Callable[[], Cache]) -> Row:
        """Measure one line; a cache of one row comes from `filled`."""
        batch = self.batch_of(name, context, asked)
        row = Row(name, context, batch, "measured")
        needed = (self.weights + batch * self.row_bytes(name, context)) / 1e9
        takes = SECONDS + A_TOKEN * context + TO_COMPILE * (name == STATIC)
        late = self.deadline.refuses(takes if self.device.type == "cuda" else 0.0)
        if needed > self.options.memory:
            row.outcome = f"not run: it needs about {needed:.0f} GB, more than {self.options.memory:g} GB"
        elif late is not None:
            row.outcome = late
        else:
            devices.forget_peak(self.device)
            try:
                with self.batched(name, filled(), context, batch) as (cache, call):
                    self._measure(row, cache, call)
            except torch.OutOfMemoryError:
                row.outcome = f"out of memory, although only {needed:.0f} GB were expected"
            except Exception as error:  # noqa: BLE001 - the other lines still count
                row.outcome = devices.failure(error)
            if row.outcome != "measured":
                row.tokens_per_second = None
        devices.forget_peak(self.device)
        return row

    def _measure(self, row: Row, cache: Cache, call: Callable[..., Any]) -> None:
        token, few = self._tokens(row.batch, 1), self.options.tokens

        def decode(steps: int) -> None:
            for _ in range(steps):
                call(token, past_key_values=cache)

        decode(WARM)
        steps = [devices.seconds(self.device, lambda: decode(few)) / few for _ in range(BLOCKS)]
        row.step_ms = Spread.of([1e3 * each for each in steps])
        row.peak_bytes, row.cache_bytes = devices.peak_bytes(self.device), allocated_bytes(cache)
        step, spent = row.step_ms.median, 0.0
        if isinstance(cache, PolicyCache):
            row.compaction_ms = Spread.of([1e3 * each for each in self._compactions(cache, row)])
            spent = row.compaction_ms.median
            row.compaction_share = spent / (self.interval * step + spent)
        row.tokens_per_second = 1e3 * row.batch * self.interval / (self.interval * step + spent)

    def _compactions(self, cache: PolicyCache, row: Row) -> list[float]:
        """Fill a cache and compact it, again and again; the first time, which may compile, does not count."""
        times, peak = [], row.peak_bytes
        for _ in range(1 + (self.options.compactions if row.batch * self.interval <= FED else 1)):
            missing = self.options.budget + self.interval - cache.engine.rows[0].resident
            for piece in self._tokens(row.batch, missing).split(max(1, FED // row.batch), 1):
                cache.expect("verify")
                self.model(piece, past_key_values=cache, logits_to_keep=1)
            devices.forget_peak(self.device)
            times.append(devices.seconds(self.device, cache.engine.settle))
            if cache.engine.rows[0].resident > self.options.budget:
                raise RuntimeError(f"{cache.engine.rows[0].resident} entries are left of {self.options.budget}")
            peak = max(peak or 0, devices.peak_bytes(self.device) or 0) or None
        row.peak_bytes = peak
        return times[1:]

    def _tokens(self, rows: int, count: int) -> Tensor:
        return torch.randint(0, self.model.config.vocab_size, (rows, count), device=self.device)

    @contextmanager
    def filled(self, name: str, context: int) -> Iterator[Callable[[], Cache]]:
        """Give a function that returns a cache of one row behind `context` tokens, filled when first asked for."""
        with ExitStack() as stack:
            made: list[Cache] = []

            def fill() -> Cache:
                if not made:
                    cache: Any = DynamicCache(config=self.model.config)
                    if name in POLICIES:
                        policy = policy_with(name, self.options.budget, self.options.interval)
                        cache = stack.enter_context(PolicyCache(policy, self.model))
                    self.model(self._tokens(1, context), past_key_values=cache, logits_to_keep=1)
                    self.model(self._tokens(1, 1), past_key_values=cache)  # compacts the prompt, if it is a policy's
                    made.append(cache)
                return made[0]

            yield fill

    @contextmanager
    def batched(self, name: str, one: Cache, context: int, batch: int) -> Iterator[tuple[Cache, Callable[..., Any]]]:
        """Repeat a cache of one row; give the copy and what decodes with it."""
        if name == STATIC:
            torch.compiler.reset()
            # A step's bytes of compiled code do not outlive it; the shapes of the next line are others.
            cache = StaticCache(config=self.model.config, max_cache_len=context + self.steps + 8)
            for index, layer in enumerate(one.layers):
                keys, values = (t.expand(batch, *t.shape[1:]) for t in (layer.keys, layer.values))
                cache.update(keys, values, index)
            compiled = torch.compile(self.model.__call__, fullgraph=True, dynamic=False, backend=self.options.compiler)
            yield cache, compiled
            return
        twin: Any = one.fork() if isinstance(one, PolicyCache) else copy.deepcopy(one)
        try:
            twin.batch_repeat_interleave(batch)
            yield twin, self.model
        finally:
            if isinstance(twin, PolicyCache):
                twin.close()


def lines(bench: Bench) -> Iterator[Row]:
    """Measure all lines: what runs as it is first, and what has to be compiled once for each shape behind it."""
    options = bench.options
    for names in ((FULL, *POLICIES), (STATIC,)):
        for context in options.context:
            for name in names:
                with bench.filled(name, context) as filled:
                    for batch in options.batch:
                        yield bench.line(name, context, batch, filled)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line as soon as it is measured; `--json` has all lines so far. Returns 1 if one failed."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 32768], help="tokens before decoding")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1, 32, 0], help="rows; 0 for as many as fit")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--interval", type=int, default=None, help="tokens between two compactions (the policy's)")
    parser.add_argument("--tokens", type=int, default=8, help=f"decode steps of a timed block; there are {BLOCKS}")
    parser.add_argument("--compactions", type=int, default=3, help="that are timed; of a large batch one")
    parser.add_argument("--memory", type=float, default=120.0, help="GB that weights and caches may take")
    parser.add_argument(
        "--until", type=float, help="begin no line that would not be done by then (as `date +%%s` says)"
    )
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    options = parser.parse_args(argv)
    if options.quick:
        options.device, options.compiler = "cpu", "eager"
        options.shape = options.shape if options.shape.startswith("toy") else "toy-llama"
        options.context, options.batch, options.budget, options.interval = [40], [0], 24, 8
        options.tokens, options.compactions, options.memory = 1, 1, 0.0003
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu_decode.py measures on a CUDA or HIP device, and there is none here.", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    deadline = devices.Deadline(options.until)
    device = torch.device(options.device)
    model = random_model(options.shape, device, getattr(torch, options.dtype))
    bench, rows, failed = Bench(model, options, deadline), [], False
    print(f"{options.shape}, {options.dtype}, budget {options.budget}, a compaction every {bench.interval} tokens")
    for row in lines(bench):
        rows.append(asdict(row))
        failed |= row.outcome.startswith("failed")
        print(text(row), flush=True)
        measuring.write(options, "gpu_decode", {"on": devices.facts(device), "rows": rows})
    return int(failed)


def text(row: Row) -> str:
    """Write a line."""
    head = f"{row.cache:22} {row.context:6} {row.batch:5}  "
    if row.tokens_per_second is None or row.step_ms is None:
        return head + row.outcome
    share = "" if row.compaction_share is None else f", compaction {row.compaction_share:.1%} of the time"
    peak = "" if row.peak_bytes is None else f", at most {row.peak_bytes / 1e9:.1f} GB"
    return f"{head}{row.tokens_per_second:9.1f} tokens/s, {row.step_ms.text()} ms a step{share}{peak}"


if __name__ == "__main__":
    raise SystemExit(main())
