"""How far policies are from the full cache on text: KL under teacher forcing, paired by text.

    python examples/density_study/measure.py --model smollm2 --split test --kinds prose code --budgets 128 256

The numbers are those of `kvpolicy study run` (metric `kl`, nats per token); here the full cache reads each text once
for all policies. `--split development` is what settings may be chosen on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from texts import documents, kinds
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpolicy
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.opening import locate
from kvpolicy.study.forcing import full_policy, room


def read(model: Any, policy: Policy, tokens: Tensor, prompt: int, block: int = 0) -> Tensor:
    """Return the next-token log-probabilities behind the prompt under a policy, fp32 `[N - prompt, V]`."""
    found = []
    with torch.inference_mode(), PolicyCache(policy, model) as cache:
        model(tokens[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
        at = prompt
        while at < tokens.shape[1]:
            count = min(block or room(cache), tokens.shape[1] - at)
            cache.expect("verify")
            logits = model(
                tokens[:, at : at + count], past_key_values=cache, use_cache=True,
                position_ids=torch.arange(at, at + count)[None],
            ).logits  # fmt: skip
            found.append(logits[0].float().log_softmax(-1))
            at += count
    return torch.cat(found)


def divergence(full: Tensor, ours: Tensor) -> float:
    """Return the mean KL from `full` to `ours`, both log-probabilities `[N, V]`, in nats."""
    each = [(p.exp() * (p - q)).sum(-1).clamp(min=0) for p, q in zip(full.split(64), ours.split(64), strict=True)]
    return float(torch.cat(each).double().mean())


def pieces(tokenizer: Any, texts: Sequence[str], tokens: int, count: int) -> list[Tensor]:
    """Return the beginnings of the first documents that are long enough, int64 `[1, tokens]` each."""
    found: list[Tensor] = []
    for text in texts:
        ids = tokenizer(text[: 16 * tokens], return_tensors="pt")["input_ids"][:, :tokens]
        if ids.shape[1] == tokens and len(found) < count:
            found.append(ids)
    return found


def main() -> None:
    """Read the command line and print a table, one row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--policies", nargs="+", default=["rkv-density", "rkv", "snapkv"], help="names or files")
    parser.add_argument("--kinds", nargs="+", default=None)
    parser.add_argument("--maths", type=Path, help="JSON Lines with the fields problem and solution")
    parser.add_argument("--split", choices=("development", "test"), default="development")
    parser.add_argument("--budgets", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--interval", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--count", type=int, default=1, help="texts of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = locate(options.model, user="the measurement")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print("| text | piece | budget |", " | ".join(options.policies), "|")
    for kind in options.kinds or kinds(maths=options.maths):
        chosen = pieces(tokenizer, documents(kind, options.split, maths=options.maths), options.tokens, options.count)
        for number, ids in enumerate(chosen):
            full = read(model, full_policy(), ids, options.prompt, block=64)
            for budget in options.budgets:
                row = []
                for name in options.policies:
                    spec = kvpolicy.load(name, budget=budget).replace("trigger", {"every": options.interval})
                    row.append(f"{divergence(full, read(model, spec.build(), ids, options.prompt)):.4f}")
                print(f"| {kind} | {number} | {budget} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
