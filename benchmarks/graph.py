"""What a decode step gains as one graph: eager against compiled, in one process and in turn.

Lanes of a batch: a policy's cache with the model as it is, the same with `graph=True` and a compiled `forward`, and
transformers' `StaticCache` compiled in the same way. The first run of each, in which it is compiled, does not count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "shared"))

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import kvpolicy
from kvbench.measuring import Sample, Spread, arguments, cpu_clock, machine, show, timed, write
from kvpolicy.runtimes.hf import PolicyCache

SHAPES: dict[str, dict[str, int]] = {
    "narrow": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 16, "num_attention_heads": 4,
               "num_key_value_heads": 2, "vocab_size": 256},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152},
}  # fmt: skip

Lane = Callable[[], Callable[[], object]]
"""Prepares a run, which is not timed, and returns it."""


def lanes(model: LlamaForCausalLM, batch: int, budget: int, tokens: int) -> dict[str, Lane]:
    """Return what is compared for one batch: each prepares a cache with its prompt, and returns the steps behind it.

    Args:
        model: a decoder.
        batch: rows.
        budget: entries per head of `rkv`; the prompt is as long.
        tokens: decode steps of one run.
    """
    compiled: Any = torch.compile(model.__call__, fullgraph=True, dynamic=False)
    prompt = torch.randint(3, 200, (batch, budget), generator=torch.Generator().manual_seed(0))
    slots = budget + tokens + 8

    def prepared(make: Callable[[], Any], call: Any) -> Lane:
        def prepare() -> Callable[[], object]:
            cache = make()
            cache.reset()
            model(prompt, past_key_values=cache)
            step: Tensor = torch.full((batch, 1), 7)

            def run() -> None:
                for _ in range(tokens):
                    call(step, past_key_values=cache)

            return run

        return prepare

    rkv = kvpolicy.load("rkv", budget=budget)
    caches = {
        "rkv, eager": (PolicyCache(rkv, model), model),
        "rkv, graph": (PolicyCache(rkv, model, graph=True), compiled),
        "full, eager": (PolicyCache("full", model), model),
        "full, graph": (PolicyCache("full", model, graph=slots), compiled),
        "StaticCache, compiled": (StaticCache(config=model.config, max_cache_len=slots), compiled),
    }
    return {name: prepared(lambda c=cache: c, call) for name, (cache, call) in caches.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table per shape."""
    parser = arguments(__doc__)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=160, help="decode steps of one timed run")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    if options.quick:
        options.shape, options.batch, options.budget, options.tokens, options.rounds = ["narrow"], [1], 32, 8, 1
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {}
    for shape in options.shape:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)).eval()
        rows = []
        for batch in options.batch:
            counters.clear()
            torch.compiler.reset()
            with torch.no_grad():
                some = lanes(model, batch, options.budget, options.tokens)
                samples: dict[str, list[Sample]] = {name: [] for name in some}
                for number in range(options.rounds + 1):
                    for name in list(some) if number % 2 else list(some)[::-1]:
                        sample = timed(some[name]())
                        samples[name] += [sample] if number else []
            spread = {name: Spread.of([1e3 * s.cpu / options.tokens for s in each]) for name, each in samples.items()}
            for name, each in spread.items():
                eager = spread.get(name.replace("graph", "eager"))
                ratio = f"{eager.median / each.median:.2f}" if eager is not None and eager is not each else ""
                rows.append([batch, name, each.text(), ratio])
            breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
            figures[f"{shape}, batch {batch}"] = {"ms": spread, "graph_breaks": breaks, "graphs": graphs}
            print(f"{shape}, batch {batch}: {graphs} graphs compiled for 3 lanes, {breaks} graph breaks")
        note = f"{cpu_clock()}, {machine()['processor']}, {options.threads} thread(s)"
        show(f"{shape}: ms per decode step", ["batch", "cache", "ms", "eager / graph"], rows, note)
    write(options, "graph", {"figures": figures})


if __name__ == "__main__":
    main()
