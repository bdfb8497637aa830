"""Decode speed of a policy against transformers' DynamicCache, interleaved in one process.

Both caches decode the same tokens in alternating blocks, so that a machine whose speed drifts does not favour either.
By default every token up to `--tokens` is decoded by both; with `--every N` only one block in N tokens is decoded and
timed, and the tokens between are given to both in pieces, so that long runs end in minutes.

    python benchmarks/decode.py                                      # batch 1, below and above the budget, 512 tokens
    python benchmarks/decode.py --batch 8 --tokens 4096 --budget 410 --every 512
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

import kvpolicy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf.demo_model import ensure_demo_model

_PIECE = 64  # tokens given at once between two timed blocks


@dataclass
class Lane:
    """One cache and what it cost.

    Attributes:
        name: for the table.
        cache: the cache under test.
        seconds: one entry per block.
        peak_bytes: most bytes of key and value tensors, as allocated.
    """

    name: str
    cache: Cache
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def measure(self) -> None:
        """Update the peak."""
        if isinstance(self.cache, PolicyCache):
            now = self.cache.stats().bytes_allocated
        else:
            now = sum(t.numel() * t.element_size() for layer in self.cache.layers for t in (layer.keys, layer.values))
        self.peak_bytes = max(self.peak_bytes, now)


@torch.no_grad()
def run(model: PreTrainedModel, lanes: list[Lane], tokens: torch.Tensor, prompt: int, block: int, every: int) -> None:
    """Prefill and decode `tokens` `[B, T]` in every lane, block by block in turn."""
    for lane in lanes:
        model(tokens[:, :prompt], past_key_values=lane.cache, logits_to_keep=1)
    for begin in range(prompt, tokens.shape[1], every):
        start = max(begin, min(begin + every, tokens.shape[1]) - block)
        stop = min(start + block, tokens.shape[1])
        for lane in lanes:
            for t in range(begin, start, _PIECE):
                if isinstance(lane.cache, PolicyCache):
                    lane.cache.crop(0)  # what follows is a step of several tokens, not a new turn
                model(tokens[:, t : min(t + _PIECE, start)], past_key_values=lane.cache, logits_to_keep=1)
        order = lanes if (begin // every) % 2 else lanes[::-1]
        for lane in order:
            began = time.perf_counter()
            for t in range(start, stop):
                model(tokens[:, t : t + 1], past_key_values=lane.cache, logits_to_keep=1)
            lane.seconds.append(time.perf_counter() - began)
            lane.measure()


def compare(model: PreTrainedModel, policy: str, budget: int, args: argparse.Namespace) -> dict[str, object]:
    """Run one policy beside the full cache; return the figures."""
    torch.manual_seed(0)
    tokens = torch.randint(100, model.config.vocab_size, (args.batch, args.prompt + args.tokens))
    with PolicyCache(kvpolicy.load(policy, budget=budget), model) as cache:
        lanes = [Lane("DynamicCache", DynamicCache(config=model.config)), Lane(policy, cache)]
        run(model, lanes, tokens, args.prompt, args.block, args.every or args.block)
        stats = cache.stats()
    full, ours = lanes
    ratios = [a / b for a, b in zip(full.seconds, ours.seconds, strict=True)]
    decoded = args.batch * args.block * len(full.seconds)
    return {
        "policy": policy,
        "budget": budget,
        "batch": args.batch,
        "tokens": args.tokens,
        "speed_ratio_end_to_end": sum(full.seconds) / sum(ours.seconds),
        "speed_ratio_median_block": statistics.median(ratios),
        "speed_ratio_last_block": ratios[-1],
        "tokens_per_second": {lane.name: decoded / sum(lane.seconds) for lane in lanes},
        "peak_bytes": {lane.name: lane.peak_bytes for lane in lanes},
        "peak_resident": stats.peak_resident,
        "block_seconds": {lane.name: lane.seconds for lane in lanes},
    }


def main() -> None:
    """Parse the arguments, run, print a table, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; SmolLM2-135M-Instruct by default")
    parser.add_argument("--policy", default="rkv")
    parser.add_argument("--budget", type=int, help="one budget; by default one above and one below the length")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--every", type=int, default=0, help="decode and time one block in so many tokens")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model or ensure_demo_model(), dtype=torch.float32).eval()
    length = args.prompt + args.tokens
    budgets = [args.budget] if args.budget else [2 * length, max(64, length // 10)]
    results = [compare(model, args.policy, budget, args) for budget in budgets]
    table = Table(
        "policy",
        "budget",
        "batch",
        "tokens",
        "speed vs DynamicCache",
        "median block",
        "last block",
        "peak KV MB (full / ours)",
    )
    for r in results:
        peaks = r["peak_bytes"]
        table.add_row(
            str(r["policy"]), str(r["budget"]), str(r["batch"]), str(r["tokens"]),
            f"{r['speed_ratio_end_to_end']:.2f}x",
            f"{r['speed_ratio_median_block']:.2f}x", f"{r['speed_ratio_last_block']:.2f}x",
            " / ".join(f"{v / 1e6:.1f}" for v in peaks.values()),
        )  # fmt: skip
    Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
