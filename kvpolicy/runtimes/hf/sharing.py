"""Layers that read the keys of another layer (Gemma-3n, Gemma-4): one store, several attention calls.

All of them count, each once. To a policy the query heads of every reader are query heads of the KV heads that they
read: `G` is the owner's and all sharers' together, the owner's first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy.cache.picture import LayerFacts
from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf.naming import passed


@dataclass(frozen=True)
class SharedFacts(LayerFacts):
    """What the attention calls of a store tell together.

    Attributes:
        parts: reader -> what its own call tells.
    """

    parts: Mapping[int, LayerFacts] = field(default_factory=dict)


def readers(model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> dict[int, tuple[int, ...]]:
    """Return owner -> the layers whose attention reads its keys, itself first, for owners that are read by others.

    Args:
        model: a decoder.
        modules: its attention modules by layer index.

    Raises:
        UnsupportedError: a layer reads another layer's keys and it cannot be said whose, or from another device.
    """
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or {}
    shares = {i for i, module in modules.items() if getattr(module, "is_kv_shared_layer", False)}
    found: dict[int, list[int]] = {}
    for i in sorted(shares):
        own = getattr(modules[i], "kv_shared_layer_index", None)  # said by transformers 5.2
        if not isinstance(own, int):
            # The last layer with keys of its own before the first that has none, of the same kind.
            before = [j for j in modules if j < min(shares) and (not kinds or kinds[j] == kinds[i])]
            own = max(before, default=-1)
        if own not in modules or own in shares:
            raise UnsupportedError(
                f"{type(model).__name__}: layer {i} reads the keys of another layer and does not say of which; "
                "use a model whose layers keep keys of their own."
            )
        if _device(modules[i]) != _device(modules[own]):
            raise UnsupportedError(
                f"{type(model).__name__}: layer {i} on {_device(modules[i])} reads the keys of layer {own} on "
                f"{_device(modules[own])}, and copies of keys cannot be followed; load both onto one device."
            )
        found.setdefault(own, [own]).append(i)
    return {own: tuple(all_of_them) for own, all_of_them in found.items()}


def reader(module: nn.Module, owner: int) -> int:
    """Return the layer whose attention a module is; `owner` for a module that does not say."""
    index = getattr(module, "layer_idx", owner)
    return index if isinstance(index, int) else owner


def _device(module: nn.Module) -> torch.device | None:
    hook = getattr(module, "_hf_hook", None)  # accelerate keeps parameters elsewhere until they are needed
    place = getattr(hook, "execution_device", None)
    if place is not None:
        return torch.device(place)
    first = next(module.parameters(), None)
    return None if first is None or first.device.type == "meta" else first.device


def joined_facts(parts: Mapping[int, LayerFacts], owner: int) -> SharedFacts:
    """Return what several attention calls tell together; raises UnsupportedError where they contradict each other."""
    each = list(parts.values())
    if len({(facts.scale, facts.softcap, facts.attention_sinks is None) for facts in each}) > 1:
        raise UnsupportedError(
            f"layers {', '.join(map(str, parts))} read the keys of layer {owner} and scale or cap their logits in "
            "different ways, so there is no one attention over its entries; use a model without shared keys."
        )
    sinks = [facts.attention_sinks for facts in each if facts.attention_sinks is not None]
    projections = [facts.output_projection for facts in each if facts.output_projection is not None]
    return SharedFacts(
        groups=sum(facts.groups for facts in each),
        scale=each[0].scale,
        softcap=each[0].softcap,
        attention_sinks=torch.cat(sinks, 1) if sinks else None,
        output_projection=torch.cat(projections, 1) if projections else None,
        parts=dict(parts),
    )


def joined_queries(queries: Sequence[Tensor], heads: int) -> Tensor:
    """Put the queries `[B, H * G_r, q, D]` of several readers side by side for each KV head: `[B, H * G, q, D]`."""
    return torch.cat([q.unflatten(1, (heads, -1)) for q in queries], 2).flatten(1, 2)


def compute_whole_prompts(model: PreTrainedModel) -> Callable[[], None]:
    """Let the layers of a model that read other layers' keys see every token for which it matters; return the undoing.

    transformers (5.23) runs such layers for the last `logits_to_keep` tokens only. Attention that a policy looks at
    would be missing; and of several tokens without a mask each would see the first ones of the text, for what prevents
    that asks for the attention implementation by its name.
    """
    slicing = [module for module in model.modules() if hasattr(type(module), "_maybe_slice_kv_shared_inputs")]
    handles = [module.register_forward_pre_hook(_keep_all, with_kwargs=True) for module in slicing]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def _keep_all(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    count = kwargs.get("logits_to_keep")
    if not isinstance(count, int) or not count:
        return None
    if count > 1 or getattr(passed(kwargs), "looks_at_queries", False):
        return args, {**kwargs, "logits_to_keep": 0}
    return None
