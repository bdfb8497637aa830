"""What a policy's cache costs per layer and token beyond `DynamicCache`, and what a compaction costs.

A model of 32 narrow layers: nearly all of a step is Python and small launches. With ``--beside PYTHON`` the same
is measured with another installed kvpolicy, in processes that take turns with this one's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "shared"))

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvpolicy
from kvbench.measuring import interleaved
from kvpolicy.runtimes.hf import PolicyCache

LAYERS = 32


def model() -> LlamaForCausalLM:
    """Return 32 layers of width 32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def measure(batch: int, tokens: int, rounds: int) -> dict[str, float]:
    """Return µs of CPU time per layer and token of a step, and ms of a compaction of all layers.

    Args:
        batch: rows.
        tokens: decode steps of one timed run; a compaction falls into none of them.
        rounds: timed runs of each cache.
    """
    net, prompt, token = model(), torch.randint(3, 60, (batch, 64)), torch.full((batch, 1), 7)

    def run(cache: Any) -> None:
        net(prompt, past_key_values=cache)
        for _ in range(tokens):
            net(token, past_key_values=cache)

    def plain() -> None:
        run(DynamicCache(config=net.config))

    def under(name: str, budget: int) -> Callable[[], None]:
        spec = kvpolicy.load(name, budget=budget).replace("trigger", {"every": 64})

        def step() -> None:
            with PolicyCache(spec, net) as cache:
                run(cache)

        return step

    lanes = {
        "DynamicCache": plain,
        "rkv": under("rkv", 64 + tokens),  # never fires
        "knorm": under("knorm", 64 + tokens),
        "rkv, compacted": under("rkv", 64),
    }
    with torch.no_grad():
        samples = interleaved(lanes, rounds)
    seconds = {name: statistics.median(s.cpu for s in each) for name, each in samples.items()}
    figures = {name: 1e6 * value / LAYERS / tokens for name, value in seconds.items() if "compacted" not in name}
    compactions = max((tokens - 1) // 64, 1)
    figures["compaction, ms"] = 1e3 * (seconds["rkv, compacted"] - seconds["rkv"]) / compactions
    return figures


def main() -> None:
    """Print one table per batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--beside", help="an interpreter with another kvpolicy")
    parser.add_argument("--turns", type=int, default=3, help="with --beside: processes of each, in turn")
    parser.add_argument("--bare", action="store_true", help="print the figures as JSON and nothing else")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.rounds, options.turns = 70, 1, 1
    torch.set_num_threads(1)
    for batch in options.batch:
        if options.bare:
            print(json.dumps(measure(batch, options.tokens, options.rounds)))
            continue
        sides = {"here": sys.executable} | ({"beside": options.beside} if options.beside else {})
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(options.turns):
            for side, python in sides.items():
                command = [python, "-P", __file__, "--bare", "--batch", str(batch)]
                command += ["--tokens", str(options.tokens), "--rounds", str(options.rounds)]
                found[side].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))  # noqa: S603
        medians = {
            side: {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
            for side, turns in found.items()
        }
        print(f"batch {batch}: µs of CPU time per layer and token, one thread")
        for name, here in medians["here"].items():
            line = f"  {name:16} {here:8.2f}"
            if name not in ("DynamicCache", "compaction, ms"):
                line += f"  +{here - medians['here']['DynamicCache']:.2f}"
            if options.beside:
                line += f"  beside: {medians['beside'][name]:.2f}  ratio {here / medians['beside'][name]:.2f}"
            print(line)


if __name__ == "__main__":
    main()
