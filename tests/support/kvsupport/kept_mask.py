"""A run of a whole text without a cache, in which each query sees exactly what a `PolicyCache` held at that step.

The masks of one kept set per head go in through an attention function of their own, registered with transformers, that
calls the model's eager function; nothing of kvpolicy's runtime takes part.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import eager_mask

from kvpolicy import ops
from kvpolicy.contracts.view import Rope

_NAME = "kvsupport_kept_mask"
_running: list[_Reference] = []


class _Reference:
    """The run that is under way: what each layer's heads see, and whose keys were which."""

    def __init__(self, visible: Mapping[int, Tensor], ropes: Mapping[int, Rope]) -> None:
        self.whole = visible
        self.ropes = ropes
        self.visible: dict[int, Tensor] = {}
        self.owners: dict[int, tuple[int, Tensor]] = {}  # address of keys -> layer; the keys keep the address theirs

    def step(self, start: int, end: int) -> None:
        """Say which queries of the text come next."""
        self.visible = {layer: seen[:, start:end, :end] for layer, seen in self.whole.items()}
        self.owners.clear()

    def layer(self, module: nn.Module, key: Tensor) -> int | None:
        """Return the layer whose kept sets hold for these keys; None if nothing was evicted from them."""
        index = getattr(module, "layer_idx", None)
        if index in self.visible:
            self.owners[key.data_ptr()] = (index, key)
            return int(index)
        known = self.owners.get(key.data_ptr())  # a layer that reads the keys of another
        return known[0] if known is not None else None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    run = _running[-1]
    layer = run.layer(module, key)
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    mask = attention_mask
    if layer is not None:
        seen = run.visible[layer].repeat_interleave(groups, 0)[None]
        hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        mask = hidden if mask is None else torch.minimum(mask.expand_as(hidden), hidden)
        if layer in run.ropes:
            assert heads == run.visible[layer].shape[0]
            return _turned(query, key, value, mask, run.visible[layer], run.ropes[layer], kwargs), None
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        products: Tensor = query @ key.repeat_interleave(groups, 1).mT
        return _plain(products, value, mask, kwargs, query.shape[-1]), None
    result: tuple[Tensor, Tensor | None] = eager(module, query, key, value, mask, **kwargs)
    return result


def _plain(products: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any], width: int) -> Tensor:
    """Return the attention `[B, Q, Hq, Dv]` of products `[B, Hq, Q, K]`, with what a model may add to it."""
    logits = products.float() * (kwargs.get("scaling") or width**-0.5)
    if (cap := kwargs.get("softcap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    if mask is not None:
        logits = logits + mask
    if (sinks := kwargs.get("s_aux")) is not None:
        logits = torch.cat([logits, sinks.reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    weights = logits.softmax(-1)[..., : products.shape[-1]]
    attended: Tensor = weights @ value.repeat_interleave(products.shape[1] // value.shape[1], 1)
    return attended.transpose(1, 2).contiguous()


def _turned(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, visible: Tensor, rope: Rope, kwargs: dict[str, Any]
) -> Tensor:
    """Attend as if what a query sees stood at the positions 0, 1, 2 and so on, and the query at the last of them."""
    heads, steps, length = visible.shape
    groups = query.shape[1] // heads
    places = torch.arange(length)
    visible = visible & (places <= places[length - steps :, None])
    ranks = visible.long().cumsum(-1) - 1  # [H, Q, K]
    queries = query.unflatten(1, (heads, groups)).transpose(2, 3)  # [B, H, Q, G, D]
    queries = ops.rotate(queries, rope, (ranks[..., -1] - places[length - steps :])[None, :, :, None])
    keys = ops.rotate(key[:, :, None].expand(-1, -1, steps, -1, -1), rope, (ranks - places)[None])  # [B, H, Q, K, D]
    products = (queries @ keys.mT).transpose(2, 3).flatten(1, 2)
    return _plain(products, value, mask, kwargs, query.shape[-1])


if _NAME not in AttentionInterface():
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, eager_mask)


@contextmanager
def _implementation(model: PreTrainedModel) -> Iterator[None]:
    """Let every part of a model attend through `_attention`."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = {i: getattr(c, "_attn_implementation_internal", None) for i, c in configs.items()}
    for config in configs.values():
        config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        for i, config in configs.items():
            config._attn_implementation_internal = before[i]


@torch.no_grad()
def logits_under(
    model: PreTrainedModel,
    ids: Tensor,
    visible: Mapping[int, Tensor],
    ropes: Mapping[int, Rope] | None = None,
    steps: Sequence[int] = (),
) -> Tensor:
    """Return the logits `[N, vocabulary]` of a text, in one pass without a cache.

    Args:
        model: any model whose attention goes through transformers' attention registry.
        ids: int64 `[1, N]`.
        visible: layer -> bool `[H, N, N]`: which key each query of a KV head sees; the model's own mask holds besides.
        ropes: layer -> its rotary embedding, for layers in which what is seen moves together.
        steps: tokens per pass, N in all: run over a `DynamicCache` instead, which forgets nothing. For models whose
            recurrent layers compute something else over a whole text than step by step.
    """
    run = _Reference(visible, ropes or {})
    _running.append(run)
    logits: list[Tensor] = []
    cache = DynamicCache(config=model.config) if steps else None
    end = 0
    try:
        with _implementation(model):
            for tokens in steps or (ids.shape[1],):
                start, end = end, end + tokens
                run.step(start, end)
                out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=cache is not None)
                logits.append(out.logits[0].float())
    finally:
        _running.pop()
    return torch.cat(logits)
