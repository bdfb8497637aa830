"""How a cache gets between a transformers model and its attention, without touching a model file.

An implementation named ``kvpolicy_<base>`` is registered with transformers' public registries of attention and mask
functions; it wraps the one the model already has. Keys that come out of a `PolicyCache` know their layer (`handover`);
whatever knows none passes through to the base, so that other caches on the same model notice nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf.handover import AttentionFunction, MaskFunction, announced, owner
from kvpolicy.runtimes.hf.implementations import as_loaded

PREFIX = "kvpolicy_"


def numbered_attention(model: PreTrainedModel) -> Iterator[tuple[int, nn.Module]]:
    """Yield every attention module of the decoder with the index of its layer; some layers have several."""
    text_config = model.config.get_text_config(decoder=True)
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        ours = type(getattr(module, "config", None)) is type(text_config) and "Attention" in type(module).__name__
        if isinstance(index, int) and ours and hasattr(module, "is_causal"):
            yield index, module


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return the decoder's self-attention modules by layer index."""
    found: dict[int, nn.Module] = {}
    for index, module in numbered_attention(model):
        if module.is_causal or index not in found:  # attention to an encoder is not causal
            found[index] = module
    return found


def base_attention(module: nn.Module, base: str) -> AttentionFunction:
    """Return the model's own attention function of that name, the way its modeling file would look it up."""
    # A class that was derived elsewhere, as FSDP derives one, runs the forward pass of the class it comes from.
    sources = [sys.modules.get(kind.__module__) for kind in type(module).__mro__]
    source = next((s for s in sources if hasattr(s, "ALL_ATTENTION_FUNCTIONS")), None)
    eager = getattr(source, "eager_attention_forward", None)
    interface: Any = getattr(source, "ALL_ATTENTION_FUNCTIONS", None)
    if interface is None or (base == "eager" and eager is None):
        raise UnsupportedError(
            f"{type(module).__name__} does not take its attention from transformers' attention registry, so its "
            "queries cannot be observed; use a decoder whose class does."
        )
    function: AttentionFunction = interface.get_interface(base, eager)
    return function


def register(base: str) -> str:
    """Register the wrapping attention and mask functions for one base implementation; return their name."""
    name = PREFIX + base
    functions: dict[type, AttentionFunction] = {}

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        function = functions.get(type(module))
        if function is None:
            function = functions[type(module)] = base_attention(module, base)
        layer = owner(key)
        if layer is None:
            return function(as_loaded(function, module, base), query, key, value, attention_mask, **kwargs)
        return layer.attend(function, base, module, query, key, value, attention_mask, kwargs)

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        reader = announced()
        build: MaskFunction = ALL_MASK_ATTENTION_FUNCTIONS[base]
        return build(*args, **kwargs) if reader is None else reader.take_mask(build, kwargs)

    if name not in AttentionInterface():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
    return name


def packs(function: AttentionFunction, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether `packed_attention` may stand in for a model's attention function that is given one token and no mask."""
    return (
        function is sdpa_attention_forward
        and query.is_cpu
        and not kwargs.get("dropout")
        and kwargs.get("softcap") is None
        and not kwargs.get("output_attentions")
    )


def packed_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attend from one token to everything: what sdpa computes, with the query heads of a KV head side by side.

    On a CPU sdpa reads keys and values once per query head, and like this once per KV head.

    Args:
        query: `[B, Hq, 1, D]`.
        key: `[B, H, N, D]`.
        value: `[B, H, N, Dv]`.
        scale: factor of the logits.
        mask: bool `[B, 1, 1, N]`, True = visible; None where all slots are.

    Returns:
        `[B, 1, Hq, Dv]`.
    """
    batch, heads, _, size = query.shape
    packed = query.reshape(batch, key.shape[1], -1, size)
    made = scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale)
    return made.reshape(batch, 1, heads, -1)
