"""Throughput under a fixed KV memory: the experiment of the R-KV paper (arXiv:2505.24133, table of throughputs).

For the full cache and for a policy: the largest batch whose KV entries fit into the memory when every row generates
`--tokens` tokens, and the total tokens per second of that batch. A whole run takes hours on a CPU, so blocks at several
lengths are decoded and timed, both caches in turn, and time per token is integrated over the run.

    python -P benchmarks/memory_cap.py --quick
    python -P benchmarks/memory_cap.py --tokens 8192 --json memory_cap.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

_HERE = Path(__file__).resolve().parent  # not itself on the path: kernels.py would pass for the PyPI package
sys.path[:] = [str(_HERE / "shared"), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

from kvbench import lanes as racing
from kvbench import measuring, real
from kvbench.lanes import PROMPT, Lane
from kvbench.measuring import GIB, MIB, Spread
from kvpolicy import Policy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf.model_facts import head_shapes

FULL = "full cache"
_POSITION = 4  # bytes: a policy also keeps the original position of every entry of every KV head


def batches(model: PreTrainedModel, policy: Policy, tokens: int, cap: int) -> dict[str, int]:
    """Return the largest batch of each cache whose entries fit into `cap` bytes.

    Raises:
        SystemExit: not even one row fits.
    """
    layers = len(DynamicCache(config=model.config).layers)
    heads = head_shapes(model, [0])[0][0]
    entry = racing.entry_bytes(model)
    bound = policy.bound
    if bound is None:
        raise SystemExit(f"policy {policy.name!r} has no bound while decoding, so no batch fits for sure; use another.")
    most = {
        FULL: cap // ((PROMPT + tokens) * entry),
        policy.name: cap // (bound * (entry + layers * heads * _POSITION)),
    }
    for name, rows in most.items():
        if rows < 1:
            raise SystemExit(f"{name}: one row does not fit into {cap / MIB:.0f} MiB; raise --cap or lower --tokens.")
    return most


def sampled_lengths(tokens: int, block: int, steady: int, count: int) -> list[int]:
    """Return where blocks begin: at the start, where the policy's cache becomes full, evenly behind, at the end."""
    last = PROMPT + tokens - block
    first = min(max(steady, PROMPT + block), last)
    return sorted({PROMPT, *(last - (last - first) * i // max(count - 1, 1) for i in range(count))})


@torch.no_grad()
def run(model: PreTrainedModel, policy: Policy, options: argparse.Namespace) -> dict[str, Any]:
    """Decode the sampled blocks with both caches, each at its largest batch."""
    cap, tokens = int(options.cap * GIB), options.tokens
    rows = batches(model, policy, tokens, cap)
    block, steady = racing.interval_of(policy), policy.bound or 0
    starts = sampled_lengths(tokens, block, steady, options.samples)
    text = racing.rows_of_text(PROMPT + tokens, 1, model)
    with PolicyCache(policy, model) as cache:
        lanes = [
            Lane(FULL, model, DynamicCache(config=model.config), rows[FULL]),
            Lane(policy.name, model, cache, rows[policy.name]),
        ]
        for lane in lanes:
            lane.prefill(text[:, :PROMPT])
        at = PROMPT
        for start in starts:
            for lane in lanes:
                lane.feed(text[:, at:start])
            at = start + block
            racing.decode_block(lanes, text, start, at, {FULL: options.full_tokens})
        found: dict[str, Any] = {"cap_bytes": cap, "tokens": tokens, "starts": starts, "budget": policy.budget.tokens}
        for lane in lanes:
            found[lane.name] = figures(lane, rows[lane.name], starts, block, tokens)
            if lane.peak_bytes > cap:
                raise SystemExit(f"{lane.name}: {lane.peak_bytes} bytes were allocated, more than the cap of {cap}.")
    return found


def figures(lane: Lane, rows: int, starts: list[int], block: int, tokens: int) -> dict[str, Any]:
    """Integrate what one lane's blocks cost."""
    found: dict[str, Any] = {"batch": rows, "peak_bytes": lane.peak_bytes, "blocks": []}
    points: dict[str, list[tuple[float, float]]] = {"wall": [], "cpu": []}
    for start in starts:
        times = lane.between(start, start + block)
        for clock, some in points.items():
            seconds = [getattr(t, clock) for t in times]
            # The mean, not the median: a compaction falls on one token and belongs to all.
            some.append((start + len(times) / 2, sum(seconds) / len(seconds)))
        found["blocks"].append({"start": start, "timed": len(times), "seconds": Spread.of([t.wall for t in times])})
    for clock, some in points.items():
        found[f"{clock}_seconds"] = racing.integrated(some, PROMPT, PROMPT + tokens)
        found[f"{clock}_tokens_per_second"] = rows * tokens / found[f"{clock}_seconds"]
    return found


def report(found: dict[str, Any], name: str) -> None:
    """Print the comparison, and the blocks it rests on."""
    ratio = {c: found[name][f"{c}_tokens_per_second"] / found[FULL][f"{c}_tokens_per_second"] for c in ("wall", "cpu")}
    measuring.show(
        f"{found['cap_bytes'] / MIB:.0f} MiB for keys and values, {found['tokens']} tokens per row",
        ["cache", "entries per row", "largest batch", "allocated MiB", "tokens/s (wall)", "tokens/s (CPU)", "of full"],
        [
            [
                kind, PROMPT + found["tokens"] if kind == FULL else f"{found['budget']} and the interval",
                each["batch"], f"{each['peak_bytes'] / MIB:.0f}", f"{each['wall_tokens_per_second']:.1f}",
                f"{each['cpu_tokens_per_second']:.1f}",
                "1" if kind == FULL else f"{ratio['wall']:.2f}x / {ratio['cpu']:.2f}x",
            ]
            for kind, each in ((FULL, found[FULL]), (name, found[name]))
        ],
        f"Integrated over blocks, not run from end to end. CPU: {measuring.cpu_clock()}. The full cache's copy of one "
        "layer at every step is not counted as memory.",
    )  # fmt: skip
    measuring.show(
        "Milliseconds per token of all rows by wall clock, in the blocks that were timed",
        ["from", FULL, name],
        [
            [f"{a['start'] - PROMPT}", *(f"{b['seconds'].text('.1f', 1e3)}, {b['timed']} tokens" for b in (a, z))]
            for a, z in zip(found[FULL]["blocks"], found[name]["blocks"], strict=True)
        ],
        "Median [quartiles].",
    )


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; `--quick` replaces the sizes."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--model", type=Path, help="folder of a model; SmolLM2-135M-Instruct by default")
    parser.add_argument("--policy", default="rkv")
    parser.add_argument("--cap", type=float, default=1.0, help="GiB for keys and values (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens that every row generates")
    parser.add_argument("--share", type=float, default=0.1, help="budget, as a share of --tokens")
    parser.add_argument("--interval", type=int, help="tokens between two compactions; the policy's own by default")
    parser.add_argument("--samples", type=int, default=4, help="blocks after the policy's cache is full")
    parser.add_argument("--full-tokens", type=int, default=16, help="tokens timed in a block of the full cache")
    options = parser.parse_args(argv)
    if options.quick:
        options.tokens, options.cap, options.interval = 160, 0.009, 8
        options.samples, options.full_tokens = 2, 2
    return options


def main(argv: list[str] | None = None) -> None:
    """Measure, print tables, and write JSON when asked."""
    options = parsed(argv)
    torch.set_num_threads(options.threads)
    policy = racing.policy_with(options.policy, round(options.share * options.tokens), options.interval)
    found = run(real.load_model(options.model), policy, options)
    report(found, policy.name)
    measuring.write(options, "memory_cap", {"results": found})


if __name__ == "__main__":
    main()
