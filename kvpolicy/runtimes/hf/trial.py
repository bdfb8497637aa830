"""A forward pass of a few tokens that shows, before a cache is used, whether a model attends to what it stores.

What a modeling file does between the cache and its attention stands in no configuration: latent attention expands what
it stores, some models permute the values, some keep nothing at all. A policy can evict for a model only if every layer
hands its attention function, once per pass, exactly the keys and values that the cache returned.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf.attach import attach, implementation_of
from kvpolicy.runtimes.hf.attention import attention_modules, numbered_attention
from kvpolicy.runtimes.hf.handover import AttentionFunction, MaskFunction, announce, mark
from kvpolicy.runtimes.hf.implementations import as_loaded, check_served
from kvpolicy.runtimes.hf.naming import passing

_TOKENS = 3
# With which attention implementations a model has been tried: another one may leave out what the model asks for.
_tried: weakref.WeakKeyDictionary[PreTrainedModel, set[str]] = weakref.WeakKeyDictionary()


class _Watched(DynamicLayer):
    """A layer that notes what it returned and what the attention was given of it."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = 0
        self.calls: dict[int, int] = {}  # reading module -> calls
        self.problem: str | None = None
        self.refused: UnsupportedError | None = None
        self._returned: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store as a `DynamicLayer` does."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self._returned = keys, values = keys.view_as(keys), values.view_as(values)
        self.updates += 1
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
        """Compare what came with what was returned; attend as the model does."""
        assert self._returned is not None
        try:
            check_served(base, query, kwargs)
        except UnsupportedError as error:
            self.refused = error
        self.calls[id(module)] = self.calls.get(id(module), 0) + 1
        if not (_same(key, self._returned[0]) and _same(value, self._returned[1])):
            self.problem = "does not attend to the values as it stores them"
        elif kwargs.get("position_bias") is not None:
            self.problem = "adds a position bias to its attention"
        elif query.shape[1] % key.shape[1]:
            self.problem = f"has {query.shape[1]} query heads for {key.shape[1]} KV heads"
        return function(as_loaded(function, module, base), query, key, value, mask, **kwargs)

    def found(self) -> str | None:
        """Return what is in the way, None if nothing."""
        if not self.updates:
            return "stores nothing in the cache that it is given (it is no decoder, or its configuration forbids it)"
        if self.updates > 1:
            return f"stores keys {self.updates} times in one forward pass"
        if not self.calls:
            return (
                "does not hand the keys that it stores to transformers' attention functions: it makes others out of "
                "them first, as multi-head latent attention does, or computes its attention itself"
            )
        if max(self.calls.values()) > 1 and self.problem is None:
            return f"attends {max(self.calls.values())} times in one forward pass"
        return self.problem


class _TryingCache(DynamicCache):
    """A cache that notes whether a mask was made for it by transformers' mask functions."""

    asked = False

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Return the sizes, and wait for the mask."""
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        announce(self if isinstance(self.layers[layer_idx], _Watched) else None)
        return sizes

    def take_mask(self, build: MaskFunction, kwargs: dict[str, Any]) -> Tensor | None:
        """Make the mask as the model does."""
        self.asked = True
        return build(**kwargs)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def refuse_implementation(name: str | None, place: str) -> None:
    """Raise UnsupportedError if another cache (quantised, offloaded, static, ...) is asked for by name."""
    if name not in (None, "dynamic", "hybrid"):  # the last two say nothing about a cache that is given
        raise UnsupportedError(
            f"{place}: cache_implementation {name!r} is another cache, and entries of a quantised, offloaded or static "
            "cache cannot be evicted; leave it out."
        )


def survey(model: PreTrainedModel) -> tuple[list[Any], dict[int, nn.Module]]:
    """Return the layers of a new `DynamicCache` for a model, and the attention modules of those to evict from.

    Raises:
        UnsupportedError: there is none, a layer is of a kind that is not known, or its attention cannot be followed.
    """
    name = type(model).__name__
    try:
        layers = list(DynamicCache(config=model.config).layers)
    except Exception as error:
        raise UnsupportedError(
            f"{name}: transformers cannot make a DynamicCache from its configuration ({type(error).__name__}), so "
            "there is nothing to evict from; use a model that is one decoder."
        ) from error
    for i, layer in enumerate(layers):
        forgets = getattr(layer, "is_sliding", False) or not hasattr(layer, "get_mask_sizes")
        if type(layer) is not DynamicLayer and not forgets:
            raise UnsupportedError(
                f"{name}: layer {i} keeps a {type(layer).__name__}, which kvpolicy does not know; "
                "use a model with full, sliding-window or linear attention."
            )
    modules = attention_modules(model)
    evictable = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if not evictable:
        raise UnsupportedError(f"{name}: it has no layer to evict from; use a decoder with full-attention layers.")
    if lost := [i for i in evictable if i not in modules]:
        raise UnsupportedError(
            f"{name}: layer {lost[0]} has no attention of its own that goes through transformers' attention functions, "
            "so its queries cannot be observed; use a decoder whose layers do."
        )
    return layers, {i: modules[i] for i in evictable}


def try_attention(model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> None:
    """Run a few tokens through a model, once for each attention implementation, and check what that is given.

    A model that takes no text alone cannot be tried; it is left to the checks of each forward pass.

    Args:
        model: left as it was.
        modules: the attention modules of the layers whose entries are to be evicted, by layer index.

    Raises:
        UnsupportedError: a layer does not attend to what it stores, or the model takes no `DynamicCache`.
    """
    base = implementation_of(model.config.get_text_config(decoder=True))
    if base in _tried.get(model, ()):
        return
    name = type(model).__name__
    cache = _TryingCache(config=model.config)
    watched = {i: _Watched() for i in modules}
    for i, layer in watched.items():
        cache.layers[i] = layer
    with _undisturbed(model, modules), _noticed(model, modules) as beside:
        error = _run(model, cache)
        if refused := next((layer.refused for layer in watched.values() if layer.refused is not None), None):
            raise refused
        if error is not None and _run(model, None) is None:
            first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            raise UnsupportedError(
                f"{name} does not run with the cache of transformers that a PolicyCache is ({type(error).__name__}: "
                f"{first}); use a model that takes a DynamicCache."
            )
    for i, layer in watched.items() if error is None else ():
        if problem := layer.found():
            raise UnsupportedError(
                f"{name}: layer {i} {problem}, so its entries cannot be evicted; use a decoder whose layers attend to "
                "what they store."
            )
    if error is None and not cache.asked:
        encoder = getattr(model.config, "is_decoder", None) is False
        instead = "set is_decoder=True in its configuration, if it was trained as one" if encoder else "use a decoder"
        raise UnsupportedError(
            f"{name} makes no mask for what its cache holds, as a model in which each token sees all others; {instead}."
        )
    if seeing := [i for i, module in modules.items() if getattr(module, "is_causal", True) is False] + beside:
        raise UnsupportedError(
            f"{name}: the attention of layer {seeing[0]} is not causal by itself (`is_causal` is False), so that "
            "tokens may see those that follow them; use a causal decoder."
        )
    if error is None:
        _tried.setdefault(model, set()).add(base)


def alike(modules: Mapping[int, nn.Module]) -> list[list[int]]:
    """Group layers whose attention modules have the same shapes, dtype and device, quantised ones too."""
    groups: dict[object, list[int]] = {}
    for i, module in modules.items():
        parts = [(type(m), getattr(m, "in_features", 0), getattr(m, "out_features", 0)) for m in module.modules()]
        weights = [(p.device, p.dtype, p.shape) for p in module.parameters()]
        groups.setdefault((tuple(parts), tuple(weights)), []).append(i)
    return list(groups.values())


@torch.no_grad()
def _run(model: PreTrainedModel, cache: DynamicCache | None) -> Exception | None:
    """Run the tokens; return what the model raised."""
    device = model.device if model.device.type != "meta" else torch.device("cpu")  # hooks of an offloaded model move it
    tokens = torch.arange(1, _TOKENS + 1, device=device)[None] % model.config.get_text_config(decoder=True).vocab_size
    try:
        model(input_ids=tokens, use_cache=cache is not None, **passing(cache, model.forward))
    except Exception as error:  # noqa: BLE001  whatever a modeling file raises
        return error
    return None


@contextmanager
def _noticed(model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> Iterator[list[int]]:
    """Collect the layers in which another attention, which is not causal, runs beside the one that is followed.

    Attention to an encoder does not run where there is none. What runs on text alone may read what a layer stores.
    """
    ran: list[int] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
        for index, module in numbered_attention(model)
        if index in modules and module is not modules[index] and not module.is_causal
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _undisturbed(model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> Iterator[None]:
    """Attach to a model and leave it as it was: its mode, and how far an image has moved the positions behind it."""
    detach = attach(model, dict(modules))
    training = [module for module in model.modules() if module.training]
    moved = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    model.eval()
    try:
        yield
    finally:
        detach()
        announce(None)
        for module in training:  # its parts may be in other modes than the whole
            module.training = True
        for module, deltas in moved:
            module.rope_deltas = deltas
