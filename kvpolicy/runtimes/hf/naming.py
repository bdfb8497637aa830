"""What transformers calls a cache among a model's arguments: `cache` from 5.24 on, `past_key_values` before that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final
from weakref import WeakKeyDictionary

from transformers import GenerationMixin

NAMES: Final = ("cache", "past_key_values")
"""The newest first; modeling files that come with a checkpoint may keep the older one for long."""

_LOOP = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
_GENERATION: Final = next(name for name in NAMES if name in _LOOP)
_names: WeakKeyDictionary[Callable[..., Any], str] = WeakKeyDictionary()


def passing(cache: Any, function: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Return a cache as the keyword argument that takes it.

    Args:
        cache: the cache.
        function: a model's `forward`; None for `generate` and whatever hands everything on to it.
    """
    if function is None:
        return {_GENERATION: cache}
    plain = getattr(function, "__func__", function)  # a bound method is another object at every look
    name = _names.get(plain)
    if name is None:  # reading a signature takes as long as a layer, and some call this once for each token
        known = inspect.signature(function).parameters
        name = _names[plain] = next((name for name in NAMES if name in known), _GENERATION)
    return {name: cache}


def passed(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of a forward pass, or None."""
    cache = kwargs.get("cache")  # no generator: graphs are traced through here
    return kwargs.get("past_key_values") if cache is None else cache
