"""Tensor parallelism: each process holds some of the heads, and keeps what one process would keep.

torchrun --nproc-per-node 2 examples/tensor_parallel.py         # over gloo, on a CPU
python -P examples/tensor_parallel.py                           # the same in one process
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM

import kvpolicy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.opening import locate


def main(argv: Sequence[str] | None = None) -> list[int]:
    """Generate; returns the tokens, which are the same on every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reasoner", help="its KV heads must be a multiple of the processes")
    parser.add_argument("--policy", default="rkv")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=120)
    options = parser.parse_args(argv)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    place = locate(options.model, user="this example")
    # transformers splits the weights by its plan for the model; the cache finds out which heads are here.
    split = {"tp_plan": "auto"} if ranks > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **split).eval()
    ids = torch.randint(5, 200, (1, 60), generator=torch.Generator().manual_seed(0))
    spec = kvpolicy.load(options.policy, budget=options.budget).replace("trigger.every", 16)
    with PolicyCache(spec, model) as cache:
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=options.tokens,
            min_new_tokens=options.tokens, do_sample=False,
        )  # fmt: skip
        stats = cache.stats()
    each = stats.bytes_resident // max(stats.resident, 1)
    held = f"{stats.resident} of {stats.seen} tokens held, {each} bytes for each of them here"
    print(f"rank {rank} of {ranks}: {held}\n", end="")  # one write, which another rank's cannot come between
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    tokens: list[int] = output[0, 60:].tolist()
    if not rank:
        print(f"{tokens}\n", end="")
    return tokens


if __name__ == "__main__":
    main()
