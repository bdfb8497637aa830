"""The rotary embedding of a model's layers, checked against the model's own code before it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kvpolicy import ops
from kvpolicy.contracts.view import Rope
from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf.naming import passing

_CHANGING = ("dynamic", "longrope")
_PLACES = (3, 11)
_TOLERANCE = 0.05  # of the size: bfloat16 keys agree to 1 %, another rotation is off by more than 10 %


@torch.no_grad()
def layer_ropes(model: PreTrainedModel, layers: Sequence[int]) -> dict[int, Rope]:
    """Return the rotary embedding of each layer.

    Raises:
        UnsupportedError: the model has none, it changes with the length of the text, its positions are not one number
            per token, or keys cannot be turned the way this model turns them.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    rotary = _rotary(model, type(config))
    if rotary is None:
        raise UnsupportedError(f"{name} has no rotary embedding, so kept keys cannot be un-rotated or re-rotated.")
    kinds = getattr(config, "layer_types", None)
    found: dict[int, Rope] = {}
    turned: dict[int, Tensor] = {}
    for layer in layers:
        kind = kinds[layer] if kinds else None
        parameters = _parameters(config, kind)
        if parameters.get("rope_type") in _CHANGING:
            raise UnsupportedError(
                f"{name} has {parameters['rope_type']!r} rotary embeddings, which change with the length of the text, "
                "so kept keys cannot be un-rotated or re-rotated; use a policy that leaves positions alone."
            )
        if "mrope_section" in parameters:
            raise UnsupportedError(
                f"{name} counts positions in several dimensions, so kept keys cannot be un-rotated or re-rotated; "
                "use a policy that leaves positions alone."
            )
        turned = turned or _probe(model, name)
        found[layer] = _matching(turned[layer], _frequencies(rotary, kind), name, layer)
    return found


def _parameters(config: Any, kind: str | None) -> Mapping[str, Any]:
    """Return what a configuration says of the rotary embedding of a kind of layers; nothing for kinds it leaves out."""
    said = getattr(config, "rope_parameters", None) or {}
    by_kind = any(isinstance(value, Mapping) for value in said.values())
    found = said.get(kind) if by_kind else said
    return found or {}


def _frequencies(rotary: nn.Module, kind: str | None) -> Tensor | None:
    """Return the inverse frequencies of a kind of layers, fp32 `[R/2]`; None if the model keeps none for it."""
    names = ("inv_freq", f"{kind}_inv_freq")
    found = next((each for name in names if isinstance(each := getattr(rotary, name, None), Tensor)), None)
    if found is None or found.device.type != "meta":
        return found
    # The buffer of an offloaded model lies elsewhere. It is made of the configuration, and checked against the keys.
    make: Any = type(rotary)
    return _frequencies(make(rotary.config), kind)


def _rotary(model: PreTrainedModel, config_type: type) -> nn.Module | None:
    for module in model.modules():
        child = getattr(module, "rotary_emb", None)
        if isinstance(child, nn.Module) and type(getattr(child, "config", None)) is config_type:
            return child
    return None


def _probe(model: PreTrainedModel, name: str) -> dict[int, Tensor]:
    """Return each layer's keys `[2, H, 1, D]` of one token alone, at positions 3 and 11.

    A token alone attends to nothing but itself, so that the two rows differ by the rotation of their keys only.
    """
    # accelerate keeps the parameters of an offloaded model on `meta` until a module runs, and moves inputs by itself.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    token = torch.full((2, 1), model.config.get_text_config(decoder=True).vocab_size // 2, device=device)
    places = torch.tensor(_PLACES, device=device)[:, None]
    cache = DynamicCache(config=model.config)
    training = model.training
    model.eval()
    try:
        model(token, position_ids=places, use_cache=True, **passing(cache, model.forward))
        return {i: layer.keys for i, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None}
    except Exception as error:
        raise UnsupportedError(
            f"{name}: its rotary embedding cannot be tried out ({type(error).__name__}), so kept keys cannot be "
            "un-rotated or re-rotated; use a policy that leaves positions alone."
        ) from error
    finally:
        model.train(training)


def _matching(turned: Tensor, inv_freq: Tensor | None, name: str, layer: int) -> Rope:
    """Return the rotation that leads from the first row of a layer's keys to the second; some layers have none."""
    before, after = turned.float()
    candidates = [Rope(torch.zeros(before.shape[-1] // 2, device=turned.device))]
    if inv_freq is not None and 2 * inv_freq.numel() <= before.shape[-1]:
        inv_freq = inv_freq.float().to(turned.device)
        candidates += [Rope(inv_freq), Rope(inv_freq, interleaved=True)]
    # Each dimension counts alike: a few of them, turned slowly, can hold nearly all of a key's length.
    size = torch.cat([before, after]).square().sum((0, 1)).sqrt().clamp(min=1e-30)
    delta = torch.tensor(_PLACES[1] - _PLACES[0])
    errors = [
        float(((ops.rotate(before, rope, delta) - after) / size).square().sum((0, 1)).mean()) for rope in candidates
    ]
    if min(errors) > _TOLERANCE**2:
        raise UnsupportedError(
            f"{name} turns the keys of layer {layer} in a way that kvpolicy does not know, so kept keys cannot be "
            "un-rotated or re-rotated; use a policy that leaves positions alone."
        )
    return candidates[errors.index(min(errors))]
