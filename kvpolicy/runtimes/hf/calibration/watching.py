"""Runs a model over tokens and shows the queries, keys and values of each layer's attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvpolicy import ops
from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf.attach import attach
from kvpolicy.runtimes.hf.attention import attention_modules
from kvpolicy.runtimes.hf.handover import AttentionFunction, mark
from kvpolicy.runtimes.hf.hidden import hidden_states, leave_hidden_states
from kvpolicy.runtimes.hf.naming import passing
from kvpolicy.runtimes.hf.projection import output_projection


@dataclass(frozen=True)
class Attended:
    """What one layer's attention was given, for one text.

    Attributes:
        layer: its index.
        queries: fp32 `[H, G, N, D]`, after RoPE.
        keys: fp32 `[H, N, D]`, after RoPE.
        values: fp32 `[H, N, Dv]`.
        scale: factor of the logits.
        softcap: soft cap of the logits, or None.
        sinks: learned sink logits `[H, G]`, or None.
        module: the attention module.
        dtype: what the model computes in.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None
    module: nn.Module
    dtype: torch.dtype

    def weights(self, at: Tensor) -> Tensor:
        """Return the attention weights of the queries at some positions (int64 `[Q]`), fp32 `[H, G, Q, N]`."""
        heads, count, _ = self.keys.shape
        places = torch.arange(count, dtype=torch.int32, device=at.device).expand(1, heads, count)
        seen = at.to(torch.int32)[None]
        weights: Tensor = ops.attention_weights(
            self.queries[None, :, :, at],
            seen,
            torch.ones_like(seen, dtype=torch.bool),
            self.keys[None],
            places,
            torch.ones_like(places, dtype=torch.bool),
            scale=self.scale,
            softcap=self.softcap,
            attention_sinks=self.sinks,
        )
        return weights[0]

    def hidden_states(self) -> Tensor:
        """Return what the attention read, fp32 `[N, E]`; while `look` runs only. Raises UnsupportedError."""
        return hidden_states(self.module, self.keys.shape[1])[0].float()

    def output_projection(self) -> Tensor:
        """Return the output projection, fp32 `[H, G, Dv, M]`; raises UnsupportedError."""
        heads, groups = self.queries.shape[:2]
        return output_projection(self.module, heads, groups, self.values[None].to(self.dtype)).float()


class _WatchedLayer(DynamicLayer):
    """A growing layer that hands what its attention is given to a function before attending."""

    def __init__(self, index: int, look: Callable[[Attended], None]) -> None:
        super().__init__()
        self.index = index
        self.look = look

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        mark(keys, self)
        return keys, values

    def attend(
        self,
        function: AttentionFunction,
        base: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        heads = key.shape[1]
        sinks = kwargs.get("s_aux")
        scaling = kwargs.get("scaling")
        self.look(
            Attended(
                layer=self.index,
                queries=query[0].float().unflatten(0, (heads, -1)),
                keys=key[0].float(),
                values=value[0].float(),
                scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
                softcap=kwargs.get("softcap"),
                sinks=None if sinks is None else sinks.float().reshape(heads, -1),
                module=module,
                dtype=value.dtype,
            )
        )
        return function(module, query, key, value, mask, **kwargs)


def check(model: PreTrainedModel) -> int:
    """Return the number of layers; raises UnsupportedError unless all of them have full attention."""
    layers = DynamicCache(config=model.config).layers
    modules = attention_modules(model)
    other = [i for i, layer in enumerate(layers) if type(layer) is not DynamicLayer or i not in modules]
    if other or not layers:
        raise UnsupportedError(
            f"{type(model).__name__}: layer {other[0] if other else 0} has no full attention, and a table needs "
            "numbers for every layer; calibrate a model whose layers all have full attention."
        )
    return len(layers)


@torch.no_grad()
def watch(model: PreTrainedModel, tokens: Tensor, look: Callable[[Attended], None]) -> None:
    """Run the model over tokens (int64 `[N]`) and show `look` every layer's attention, in order of the layers."""
    count = check(model)
    cache = Cache(layers=[_WatchedLayer(index, look) for index in range(count)])
    modules = attention_modules(model)
    undo = [attach(model, modules), leave_hidden_states(modules.values())]
    try:
        base = model.base_model
        base(input_ids=tokens[None].to(model.device), use_cache=True, **passing(cache, base.forward))
    finally:
        for each in undo:
            each()
