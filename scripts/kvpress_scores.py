r"""Write kvpress's scores of a real prompt, and what they were computed from, to a safetensors file.

Runs where kvpress is installed, which patches transformers when it is imported and needs a version below 5.3:

    python -m venv .kvpress && .kvpress/bin/pip install kvpress==0.5.5 transformers==5.2.0
    .kvpress/bin/python scripts/kvpress_scores.py --model MODEL_FOLDER --text LICENSE out.safetensors

Without more options: all layers and heads, 512 tokens and the parameters that kvpress has by default; scores are
computed by the model's own attention modules. With ``--small``: one KV head of one layer, 128 tokens in half precision
and smaller windows. That is the file of the fast tests:

    .kvpress/bin/python scripts/kvpress_scores.py --model MODEL_FOLDER --text LICENSE --small \
        tests/plugins/data/kvpress_smollm2.safetensors

MODEL_FOLDER holds the demo model (`kvpolicy.runtimes.hf.demo_model.ensure_demo_model` makes it and returns its path).
`docs/kvpress.md` compares the scores with ours.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvpress
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

FULL = {"tokens": 512, "window": 64, "kernel": 5, "lag": 128, "cur_window": 16, "future": 512, "chunk": 256}
SMALL = {"tokens": 128, "window": 16, "kernel": 5, "lag": 32, "cur_window": 16, "future": 512, "chunk": 64}
SMALL_PLACE = (17, 1)
"""Layer and KV head of the small file."""
SKETCH = 48
RATIO = 0.75
"""Share that StreamingLLM evicts."""
PYRAMIDS = ((4096, 0.5), (4096, 0.53125), (8192, 0.75), (16384, 0.75), (32768, 0.875))
"""Prompt lengths and shares to evict for PyramidKV's budgets (window 64, beta 20), neither clamped nor uniform."""


@dataclass
class Layer:
    """What a press is shown of one layer.

    Attributes:
        module: the attention, or a stand-in that takes queries for hidden states.
        hidden: `[1, N, M]`.
        keys, values: `[1, H, N, D]`, keys after RoPE.
        queries: `[1, H*G, N, D]` before RoPE.
        rotation: cosines and sines, `[1, N, D]` each.
    """

    module: Any
    hidden: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor
    rotation: tuple[Tensor, Tensor]


def capture(model: nn.Module, ids: Tensor) -> list[Layer]:
    """Run the model once and note what its attention modules see."""
    seen: list[tuple[Any, Tensor, tuple[Tensor, Tensor]]] = []

    def note(module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((module, kwargs["hidden_states"], kwargs["position_embeddings"]))

    modules = [layer.self_attn for layer in model.model.layers]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    layers = []
    for (module, hidden, rotation), held in zip(seen, cache.layers, strict=True):
        module.rotary_emb = model.model.rotary_emb  # as kvpress's context manager does
        queries = module.q_proj(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        layers.append(Layer(module, hidden, held.keys, held.values, queries, rotation))
    return layers


def one_head(layer: Layer, head: int, dtype: torch.dtype) -> Layer:
    """Cut a layer down to one KV head, its numbers rounded to `dtype`: the rounded ones are what is scored."""
    config = layer.module.config
    group = config.num_attention_heads // config.num_key_value_heads

    def cut(x: Tensor, first: int, count: int) -> Tensor:
        return x[:, first : first + count].to(dtype).float().contiguous()

    queries = cut(layer.queries, head * group, group)
    module = SimpleNamespace(
        config=SimpleNamespace(num_attention_heads=group, num_key_value_heads=1),
        head_dim=layer.module.head_dim,
        layer_idx=layer.module.layer_idx,
        rotary_emb=layer.module.rotary_emb,
        q_proj=nn.Identity(),
    )
    hidden = queries.transpose(1, 2).flatten(2)
    return Layer(module, hidden, cut(layer.keys, head, 1), cut(layer.values, head, 1), queries, layer.rotation)


def scores(layer: Layer, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Return the scores of one layer by press, `[1, H, N]` each, and what they need beside keys and queries."""
    heads, dim = layer.keys.shape[1], layer.keys.shape[-1]
    filters = torch.randn(heads, dim, generator=torch.Generator().manual_seed(layer.module.layer_idx))
    q_filter = kvpress.QFilterPress(0.5)
    q_filter.q_filters = {layer.module.layer_idx: filters}
    window = {"window_size": sizes["window"], "kernel_size": sizes["kernel"]}
    presses = {
        "knorm": kvpress.KnormPress(0.5),
        "keydiff": kvpress.KeyDiffPress(0.5),
        "snapkv": kvpress.SnapKVPress(0.5, **window),
        "tova": kvpress.TOVAPress(0.5),
        "lagkv": kvpress.LagKVPress(0.5, lag_size=sizes["lag"]),
        "lagkv_cross": kvpress.LagKVPress(0.5, lag_size=sizes["lag"], cross_scoring=True),
        "cur": kvpress.CURPress(0.5, local_window_size=sizes["cur_window"]),
        "cur_mean": kvpress.CURPress(0.5, leverage_type="kv_avg", local_window_size=sizes["cur_window"]),
        "cur_key": kvpress.CURPress(0.5, leverage_type="key", use_local_approximation=False),
        "expected_attention": kvpress.ExpectedAttentionPress(0.5, n_future_positions=sizes["future"]),
        "expected_attention_mean": kvpress.ExpectedAttentionPress(0.5, use_covariance=False, epsilon=0.01),
        "streaming_llm": kvpress.StreamingLLMPress(RATIO),
        "non_causal": kvpress.NonCausalAttnPress(0.5, chunk_size=sizes["chunk"]),
        "q_filter": q_filter,
    }
    kwargs = {"position_embeddings": layer.rotation}
    found = {
        name: press.score(layer.module, layer.hidden, layer.keys.clone(), layer.values.clone(), None, kwargs)
        for name, press in presses.items()
    }
    cos, sin = (part.unsqueeze(1) for part in layer.rotation)
    first, second = layer.keys.chunk(2, dim=-1)
    plain = layer.keys * cos + torch.cat([second, -first], dim=-1) * sin
    torch.manual_seed(layer.module.layer_idx)
    found["leverage"] = kvpress.LeverageScorePress.compute_leverage_scores(plain, SKETCH)
    torch.manual_seed(layer.module.layer_idx)
    found["leverage_sketch"] = torch.randn(1, heads, dim, SKETCH) / SKETCH**0.5
    found["q_filter_filters"] = filters
    return found


def pyramid_budgets(config: Any) -> dict[str, list[int]]:
    """Return PyramidKV's budgets of all layers, window included, by prompt length and ratio."""
    budgets = {}
    for length, ratio in PYRAMIDS:
        press = kvpress.PyramidKVPress(compression_ratio=ratio, window_size=64, beta=20)
        modules = [SimpleNamespace(config=config, layer_idx=index) for index in range(config.num_hidden_layers)]
        budgets[f"{length} {ratio}"] = [press.get_layer_budget(module, length) for module in modules]
    return budgets


@torch.no_grad()
def main() -> None:
    """Read the options and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model with Llama's attention")
    parser.add_argument("--text", type=Path, required=True, help="file whose beginning is the prompt")
    parser.add_argument("--small", action="store_true", help="one head and small windows, for the fast tests")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()

    sizes = SMALL if options.small else FULL
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(options.model)(options.text.read_text(encoding="utf-8"), return_tensors="pt")
    tokens = ids.input_ids[:, : sizes["tokens"]]
    if tokens.shape[1] < sizes["tokens"]:
        parser.error(f"{options.text} has {tokens.shape[1]} tokens; {sizes['tokens']} are needed")
    layers = dict(enumerate(capture(model, tokens)))
    dtype = torch.float32
    if options.small:
        index, head = SMALL_PLACE
        dtype = torch.float16
        layers = {index: one_head(layers[index], head, dtype)}
    tensors = {"inv_freq": model.model.rotary_emb.inv_freq.float()}
    for index, layer in layers.items():
        tensors |= {f"{index}.{name}": getattr(layer, name).to(dtype) for name in ("keys", "values", "queries")}
        tensors |= {f"{index}.{name}": tensor for name, tensor in scores(layer, sizes).items()}
    facts = {
        "kvpress": version("kvpress"),
        "sizes": sizes,
        "streaming_llm_ratio": RATIO,
        "layers": sorted(layers),
        "num_layers": model.config.num_hidden_layers,
        "pyramid": pyramid_budgets(model.config),
    }
    save_file({k: t.contiguous() for k, t in tensors.items()}, options.out, metadata={"facts": json.dumps(facts)})


if __name__ == "__main__":
    main()
