"""The part of a benchmark that runs where kvpress is installed; `decode.py` and `score.py` start it with ``--kvpress``.

kvpress patches transformers when it is imported and needs a version below 5.3, so it has an interpreter of its own:

    python -m venv .kvpress && .kvpress/bin/pip install kvpress==0.5.5 transformers==5.2.0

Prints one JSON object. Nothing of kvpolicy is imported here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import kvpress
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds of one run, of the one thread or of all threads, as the other side measures."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.process_time
    wall, cpu = time.perf_counter(), clock()
    run()
    return time.perf_counter() - wall, clock() - cpu


def score(options: argparse.Namespace) -> dict[str, Any]:
    """Time the scores of SnapKV and KeyDiff of each layer in a file of keys and queries after RoPE."""
    tensors = load_file(options.file)
    layers = sorted({int(name.split(".")[0]) for name in tensors})
    times: dict[str, list[list[tuple[float, float]]]] = {"SnapKV": [], "KeyDiff": []}
    for layer in layers:
        keys, queries = tensors[f"{layer}.keys"], tensors[f"{layer}.queries"]  # [1, H, N, D], [1, Hq, Q, D]
        module = SimpleNamespace(
            config=SimpleNamespace(num_attention_heads=queries.shape[1], num_key_value_heads=keys.shape[1]),
            head_dim=keys.shape[-1],
            layer_idx=layer,
            q_proj=nn.Identity(),  # kvpress projects and rotates anew; here it is given finished queries, for nothing
        )
        observed = queries.shape[2]
        hidden = torch.cat(
            [torch.zeros(1, 1, queries.shape[1] * keys.shape[-1]), queries.transpose(1, 2).flatten(2)], 1
        )
        still = torch.ones(1, observed, keys.shape[-1]), torch.zeros(1, observed, keys.shape[-1])
        presses = {
            "SnapKV": kvpress.SnapKVPress(0.5, window_size=observed, kernel_size=7),
            "KeyDiff": kvpress.KeyDiffPress(0.5),
        }
        given = (module, hidden, keys, keys, None, {"position_embeddings": still})
        for name, press in presses.items():
            run = partial(press.score, *given)
            run()
            times[name].append([seconds(run) for _ in range(options.repeats)])
    return {"seconds": times}


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """Time decode steps under DecodingPress with SnapKV's scores, once its cache is full."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    press = kvpress.DecodingPress(
        base_press=kvpress.SnapKVPress(window_size=8, kernel_size=7),
        compression_interval=options.interval,
        target_size=options.budget,
        hidden_states_buffer_size=options.interval,
    )
    cache = DynamicCache(config=model.config)
    torch.manual_seed(0)
    total = options.budget + options.interval + options.steps
    tokens = torch.randint(100, model.config.vocab_size, (1, total)).expand(options.batch, -1)
    times, peak = [], 0
    model(tokens[:1, : options.budget], past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(options.batch)
    with press(model):
        for at in range(options.budget, total):
            # The cache's length is no longer the position, so both are said.
            place = torch.tensor([at])
            more = {"cache_position": place, "position_ids": place.expand(options.batch, 1)}
            token = tokens[:, at : at + 1]
            taken = seconds(lambda token=token, more=more: model(token, past_key_values=cache, **more))  # type: ignore[misc]
            if at >= options.budget + options.interval:
                times.append(taken)
            held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
            peak = max(peak, held)
    return {"seconds": times, "peak_bytes": peak, "entries": cache.get_seq_length()}


def main() -> None:
    """Read what to do and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    tasks = parser.add_subparsers(dest="task", required=True)
    scoring = tasks.add_parser("score")
    scoring.add_argument("--file", required=True)
    scoring.add_argument("--repeats", type=int, default=5)
    decoding = tasks.add_parser("decode")
    for name in ("batch", "budget", "interval", "steps"):
        decoding.add_argument(f"--{name}", type=int, required=True)
    decoding.add_argument("--model", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        found = score(options) if options.task == "score" else decode(options)
    found |= {name: version(name) for name in ("kvpress", "transformers", "torch")}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
