"""Why a policy keeps what it keeps: one pass of a model over a text is recorded, and policies are replayed on it.

    python examples/density_study/probe.py --model smollm2 --kinds code prose --policies rkv-density rkv snapkv

Every layer sees the keys, values and queries of the full cache, compactions come as in the runtime, and what is
reported is how far the attention output of each head is from that over all entries. It is no measurement of a policy,
for errors of a layer do not reach the next; `kvpolicy study run` measures. It can be looked at by head.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from texts import documents, kinds
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvpolicy
from kvpolicy.contracts.view import CacheView, Rope
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf.rope import layer_ropes
from kvpolicy.runtimes.opening import locate

OBSERVED: Final = 32


@dataclass
class Layer:
    """What one layer computed: queries `[1, H, G, N, D]`, keys and values `[1, H, N, D]`, and what goes with them.

    `output` are the rows of the output projection by query head, `[H, G, Dv, M]`.
    """

    index: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    rope: Rope
    output: Tensor


def record(model: Any, ids: Tensor) -> list[Layer]:
    """Run tokens `[1, N]` through a model and return its layers that see everything."""
    ropes = layer_ropes(model, range(model.config.num_hidden_layers))
    seen: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        if more.get("sliding_window") is None:
            seen[module.layer_idx] = (query, key, value, more.get("scaling") or query.shape[-1] ** -0.5)
        return plain(module, query, key, value, mask, **more)

    ALL_ATTENTION_FUNCTIONS.register("density-study-probe", watched)
    model.set_attn_implementation("density-study-probe")
    with torch.inference_mode():
        model.model(ids, use_cache=False)
    layers = []
    for index, (query, key, value, scale) in sorted(seen.items()):
        heads, dim = key.shape[1], value.shape[-1]
        rows = model.model.layers[index].self_attn.o_proj.weight.detach().T
        output = rows.reshape(heads, -1, dim, rows.shape[-1])
        queries = query.unflatten(1, (heads, -1))
        layers.append(Layer(index, queries, key, value, scale, ropes[index], output))
    return layers


def view(layer: Layer, held: Tensor, seen: int, prompt: int, count: int, budget: int, number: int) -> CacheView:
    """Return what a policy sees of a layer that has read `seen` tokens and holds `held`, int64 `[1, H, n]`."""
    at = held.unsqueeze(-1)
    keys = layer.keys.gather(2, at.expand(*held.shape, layer.keys.shape[-1]))
    values = layer.values.gather(2, at.expand(*held.shape, layer.values.shape[-1]))
    last = torch.arange(max(0, seen - OBSERVED), seen)
    one = torch.tensor
    return CacheView(
        keys=keys, values=values, positions=held.int(), valid=torch.ones_like(held, dtype=torch.bool),
        scale=layer.scale, layer_idx=layer.index, num_layers=count, prompt_length=one([prompt]), seen=one([seen]),
        compaction=one([number]), queries=layer.queries[:, :, :, last], query_positions=last.int()[None],
        query_valid=torch.ones(1, len(last), dtype=torch.bool), rope=layer.rope, budget=one([budget]),
    )  # fmt: skip


def replay(
    layers: Sequence[Layer], policy: Policy, budget: int, interval: int, prompt: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield, for each stretch between two compactions, its start and what each layer holds, int64 `[1, H, n]`."""
    total, seen, number = layers[0].keys.shape[2], prompt, 0
    held = [torch.arange(prompt).expand(1, layer.keys.shape[1], -1) for layer in layers]
    while seen < total:
        if held[0].shape[2] + 1 > budget + interval:
            views = [
                view(layer, have, seen, prompt, len(layers), budget, number)
                for layer, have in zip(layers, held, strict=True)
            ]
            kept = policy.decide(views, [budget]).kept
            held = [have.gather(2, keep.indices.long()) for have, keep in zip(held, kept, strict=True)]
            number += 1
        step = min(budget + interval - held[0].shape[2], total - seen)
        yield seen, held
        new = torch.arange(seen, seen + step)
        held = [torch.cat([have, new.expand(1, have.shape[1], -1)], 2) for have in held]
        seen += step


def errors(layer: Layer, start: int, stop: int, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is wrong with the tokens from `start` to `stop` when of those before only `held` are there.

    Returns squared error and squared size of the output (after the output projection), and the attention mass that is
    missed, summed over tokens and query heads, `[H]` each.
    """
    size = layer.keys.shape[2]
    there = torch.zeros(held.shape[1], size, dtype=torch.bool).scatter_(1, held[0], value=True)
    there[:, start:stop] = True
    causal = torch.arange(stop)[None, :] <= torch.arange(start, stop)[:, None]
    logits = layer.scale * layer.queries[0, :, :, start:stop] @ layer.keys[0, :, None, :stop].transpose(-1, -2)
    weights = logits.masked_fill(~causal, float("-inf")).softmax(-1)
    ours = logits.masked_fill(~(causal & there[:, None, None, :stop]), float("-inf")).softmax(-1)
    values = layer.values[0, :, None, :stop]
    full = torch.einsum("hgqd,hgdm->hgqm", weights @ values, layer.output)
    gone = torch.einsum("hgqd,hgdm->hgqm", (ours - weights) @ values, layer.output)
    missed = 1 - (weights * there[:, None, None, :stop]).sum(-1)
    return gone.square().sum((1, 2, 3)), full.square().sum((1, 2, 3)), missed.sum((1, 2))


def measure(layers: Sequence[Layer], policy: Policy, budget: int, interval: int, prompt: int) -> tuple[Tensor, Tensor]:
    """Return the relative squared error of each head's output and the mass it misses, `[L, H]` each."""
    wrong = torch.zeros(len(layers), layers[0].keys.shape[1])
    size, missed = wrong.clone(), wrong.clone()
    runs = list(replay(layers, policy, budget, interval, prompt))
    ends = [start for start, _ in runs[1:]] + [layers[0].keys.shape[2]]
    for (start, held), stop in zip(runs, ends, strict=True):
        for place, layer in enumerate(layers):
            one = errors(layer, start, stop, held[place])
            for sums, new in zip((wrong, size, missed), one, strict=True):
                sums[place] += new
    group, tokens = layers[0].queries.shape[2], layers[0].keys.shape[2] - prompt
    return wrong / size, missed / (group * tokens)


def main() -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--policies", nargs="+", default=["rkv-density", "rkv", "snapkv"], help="names or files")
    parser.add_argument("--kinds", nargs="+", default=None)
    parser.add_argument("--maths", type=Path)
    parser.add_argument("--split", choices=("development", "test"), default="development")
    parser.add_argument("--budgets", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--interval", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1200)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--every", type=int, default=1, help="only every so many-th layer, from the second on")
    parser.add_argument("--by-head", action="store_true", help="also print every layer and head")
    options = parser.parse_args()
    folder = locate(options.model, user="the probe")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print("| text | budget | policy | output error, % | attention missed, % |\n|---|---|---|---|---|")
    for kind in options.kinds or kinds(maths=options.maths):
        text = documents(kind, options.split, maths=options.maths)[0]
        ids = tokenizer(text[: 12 * options.tokens], return_tensors="pt")["input_ids"][:, : options.tokens]
        layers = record(model, ids)
        layers = layers[1 :: options.every] if options.every > 1 else layers
        for budget in options.budgets:
            for name in options.policies:
                spec = kvpolicy.load(name, budget=budget)
                wrong, missed = measure(layers, spec.build(), budget, options.interval, options.prompt)
                print(
                    f"| {kind} | {budget} | {spec.policy} | {100 * wrong.mean():.2f} | {100 * missed.mean():.2f} |",
                    flush=True,
                )
                if options.by_head:
                    for layer, row in zip(layers, wrong, strict=True):
                        print(f"    layer {layer.index}: " + ", ".join(f"{100 * x:.1f}" for x in row.tolist()))


if __name__ == "__main__":
    main()
