"""A model built without memory, on torch's device `meta`: its own code says what it has and what its layers keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from kvpolicy.errors import KVPolicyError, UnsupportedError

_WINDOWS: Final = ("sliding_window", "attention_chunk_size")
_BUILT: Final = torch.bfloat16  # the one dtype that all operations take on `meta`


@dataclass(frozen=True)
class Built:
    """What was counted.

    Attributes:
        parameters: of the model.
        expert_parameters: those of them in experts.
        heads: `(KV heads, key dim, value dim)` of layers that a policy works on, each with how many there are; None
            where the model's code cannot be followed without numbers.
        others: further layers, which keep a window or a state of their own.
        state: bytes of a row that those keep at most.
        query_heads: of a layer; 0 where the configuration does not say.
        longest: tokens that the model reads at most, likewise None.
    """

    parameters: int
    expert_parameters: int
    heads: tuple[tuple[tuple[int, int, int], int], ...] | None = None
    others: int = 0
    state: int | None = None
    query_heads: int = 0
    longest: int | None = None


@lru_cache(maxsize=4)
def built(place: str, dtype: str) -> Built | None:
    """Build a model of its configuration; None where transformers does not know its kind.

    Args:
        place: a folder, a config.json or an id on the hub.
        dtype: name of a dtype of torch.

    Raises:
        KVPolicyError: no policy can work on it.
    """
    try:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        config: Any = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
        config.quantization_config = None  # weights are counted, not loaded
        with torch.device("meta"):
            model: Any = _class(config)(config, dtype=_BUILT).eval()
    except Exception:  # noqa: BLE001 - what cannot be built is not known; what is wrong with the file is said elsewhere
        return None
    from kvpolicy.runtimes.hf.trial import survey

    text = model.config.get_text_config(decoder=True)
    parameters = {name: each.numel() for name, each in model.named_parameters()}
    found = Built(
        sum(parameters.values()),
        sum(count for name, count in parameters.items() if ".experts." in name),
        query_heads=_whole(text, "num_attention_heads") or 0,
        longest=_whole(text, "max_position_embeddings"),
    )
    try:
        evictable = list(survey(model)[1])
    except UnsupportedError as error:
        raise KVPolicyError(f"--model-config: no policy can be run on {place}: {error}") from error
    layers = _layers(model)
    if layers is None:
        return found
    heads = Counter((layers[i].keys.shape[1], layers[i].keys.shape[-1], layers[i].values.shape[-1]) for i in evictable)
    others = [layer for i, layer in enumerate(layers) if i not in evictable]
    tensors = [tensor for layer in others for tensor in _tensors(vars(layer)) if tensor.dim() > 1]
    # What is in the model's dtype would be in the one that is asked for; some states are fp32 in any.
    width = getattr(torch, dtype).itemsize
    state = sum(each.numel() * (width if each.dtype == _BUILT else each.element_size()) for each in tensors)
    return replace(found, heads=tuple(heads.items()), others=len(others), state=state)


def _whole(text: Any, name: str) -> int | None:
    value = getattr(text, name, None)
    return value if isinstance(value, int) else None


def _class(config: Any) -> Any:
    """Return what makes a model of a configuration: the class that it names, or that goes by its kind."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)._from_config  # noqa: SLF001 - what from_config calls
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM.from_config
    return transformers.AutoModelForImageTextToText.from_config


@torch.no_grad()
def _layers(model: Any) -> list[Any] | None:
    """Return the layers of a cache behind as many tokens as any window holds, or None."""
    from transformers import DynamicCache

    from kvpolicy.runtimes.hf.naming import passing

    text = model.config.get_text_config(decoder=True)
    windows = [size for name in _WINDOWS if isinstance(size := getattr(text, name, None), int)]
    try:
        cache: Any = DynamicCache(config=text)
        with torch.device("meta"):
            ids = torch.zeros(1, max([*windows, 8]) + 1, dtype=torch.long)
            model(input_ids=ids, use_cache=True, **passing(cache, model.forward))
    except Exception:  # noqa: BLE001 - some code asks for numbers, which a tensor without memory has not
        return None
    return list(cache.layers)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, however they are collected."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
