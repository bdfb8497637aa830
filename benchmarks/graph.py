"""What a decode step gains as one graph: eager against compiled, in one process and in turn.

Lanes of a batch: a policy's cache with the model as it is, the same with `graph=True` and a compiled `forward`, and
transformers' `StaticCache` compiled in the same way. On a GPU also the compiled steps captured as a CUDA graph each.
The first run of each lane, in which it is compiled, does not count.

    python -P benchmarks/graph.py --device cuda --shape llama-3.1-8b --layers 8 --budget 1024
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "shared"))

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, StaticCache

import kvpolicy
from kvbench import devices
from kvbench.measuring import Sample, Spread, arguments, cpu_clock, show, timed, write
from kvbench.shapes import SHAPES, random_model
from kvpolicy.runtimes.hf import PolicyCache

Run = Callable[[], object]
Lane = Callable[[], Run]
"""Prepares a run, which is not timed, and returns it."""


def captured(call: Any, cache: Any, step: Tensor) -> Run:
    """Capture a compiled step as a CUDA graph; return what runs it once more.

    On a CPU that is the compiled step: there only the code around a replay is tried.
    """
    of_policy = isinstance(cache, PolicyCache)
    if step.device.type != "cuda":
        return lambda: call(step, past_key_values=cache)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # where it compiles and sets up libraries, which cannot be captured
        call(step, past_key_values=cache)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    if of_policy:
        cache.begin_step()
    with torch.cuda.graph(graph):
        call(step, past_key_values=cache)
    graph.replay()  # nothing has run yet of the step that was begun

    def replay() -> None:
        if of_policy:
            cache.begin_step()
        graph.replay()
        if of_policy:
            cache.end_step()

    return replay


def lanes(model: PreTrainedModel, batch: int, options: argparse.Namespace) -> dict[str, Lane]:
    """Return what is compared for one batch: each prepares a cache with its prompt, and returns the steps behind it.

    Args:
        model: a decoder.
        batch: rows.
        options: `budget` entries per head of `rkv`, and tokens of the prompt; `tokens` steps of a run; `compiler`.
    """
    budget, tokens = options.budget, options.tokens
    compiled: Any = torch.compile(model.__call__, fullgraph=True, dynamic=False, backend=options.compiler)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 200, (batch, budget), generator=generator).to(model.device)
    slots = budget + tokens + 8

    def prepared(cache: Any, call: Any, *, capture: bool) -> Lane:
        def prepare() -> Run:
            cache.reset()
            model(prompt, past_key_values=cache, logits_to_keep=1)
            step: Tensor = torch.full((batch, 1), 7, device=model.device)
            once = captured(call, cache, step) if capture else lambda: call(step, past_key_values=cache)

            def run() -> None:
                for _ in range(tokens):
                    once()

            return run

        return prepare

    rkv = kvpolicy.load("rkv", budget=budget)
    graph, static = PolicyCache(rkv, model, graph=True), StaticCache(config=model.config, max_cache_len=slots)
    full = PolicyCache("full", model, graph=slots)
    some = {
        "rkv, eager": prepared(PolicyCache(rkv, model), model, capture=False),
        "rkv, graph": prepared(graph, compiled, capture=False),
        "rkv, captured": prepared(graph, compiled, capture=True),
        "full, eager": prepared(PolicyCache("full", model), model, capture=False),
        "full, graph": prepared(full, compiled, capture=False),
        "StaticCache, compiled": prepared(static, compiled, capture=False),
        "StaticCache, captured": prepared(static, compiled, capture=True),
    }
    capturing = model.device.type == "cuda" or options.quick
    return {name: lane for name, lane in some.items() if capturing or "captured" not in name}


def race(some: dict[str, Lane], options: argparse.Namespace, deadline: devices.Deadline) -> dict[str, Any]:
    """Time every lane once per round; return the figures: milliseconds of a step, and lanes that were left out."""
    device, samples, out = torch.device(options.device), {name: [] for name in some}, {}  # type: ignore[var-annotated]
    for number in range(options.rounds + 1):
        for name in list(some) if number % 2 == 0 else list(some)[::-1]:
            late = deadline.refuses(20.0 if not number else 3.0) if device.type == "cuda" else None
            if name in out or late is not None:
                if not samples[name]:
                    out[name] = out.get(name) or late
                continue
            try:
                run = some[name]()
                sample = Sample(*[devices.seconds(device, run)] * 2) if device.type == "cuda" else timed(run)
            except Exception as error:  # noqa: BLE001 - the other lanes still count
                out[name] = devices.failure(error)
                continue
            samples[name] += [sample] if number else []
    left = {name: out.get(name, "not run: no time was left") for name in some if not samples[name]}
    return {
        "ms": {n: Spread.of([1e3 * s.cpu / options.tokens for s in each]) for n, each in samples.items() if each},
        "left_out": left,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print one table per shape; returns 1 if a lane failed."""
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cpu", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default=None, choices=["bfloat16", "float32"], help="float32 on a CPU")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["narrow", "smollm2-135m"])
    parser.add_argument("--layers", type=int, help="fewer layers: compiling takes as long as there are many")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=160, help="decode steps of one timed run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--until", type=float, help="begin no lane that would not be done by then (as `date +%%s` says)"
    )
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    options = parser.parse_args(argv)
    if options.quick:
        options.shape, options.batch, options.budget, options.tokens, options.rounds = ["narrow"], [1], 32, 8, 1
        options.device, options.layers = "cpu", options.layers or 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/graph.py was given --device cuda, and there is none here.", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    device, deadline = torch.device(options.device), devices.Deadline(options.until)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    figures: dict[str, Any] = {}
    all_rows: list[dict[str, Any]] = []
    for shape in options.shape:
        model = random_model(shape, device, dtype, layers=options.layers)
        rows = []
        for batch in options.batch:
            counters.clear()
            torch.compiler.reset()
            with torch.no_grad():
                found = race(lanes(model, batch, options), options, deadline)
            for name, each in found["ms"].items():
                eager = found["ms"].get(f"{name.split(',')[0]}, eager")
                ratio = f"{eager.median / each.median:.2f}" if eager is not None and eager is not each else ""
                rows.append([batch, name, each.text(), ratio])
            rows += [[batch, name, why, ""] for name, why in found["left_out"].items()]
            breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
            figures[f"{shape}, batch {batch}"] = found | {"graph_breaks": breaks, "graphs": graphs}
            print(f"{shape}, batch {batch}: {graphs} graphs compiled for 3 caches, {breaks} graph breaks", flush=True)
            lines = [
                {"lane": name, "shape": shape, "batch": batch, "outcome": found["left_out"].get(name, "measured"),
                 "step_ms": found["ms"].get(name)}
                for name in (*found["ms"], *found["left_out"])
            ]  # fmt: skip
            all_rows += lines
            write(options, "graph", {"on": devices.facts(device), "figures": figures, "rows": all_rows})
        on = devices.facts(device)
        clock = "wall clock" if device.type == "cuda" else f"{cpu_clock()}, {options.threads} thread(s)"
        note = f"{clock}, {on['device'] if device.type == 'cuda' else on['processor']}"
        show(f"{shape}: ms per decode step", ["batch", "cache", "ms", "eager / graph"], rows, note)
    return int(any(why.startswith("failed") for each in figures.values() for why in each["left_out"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
