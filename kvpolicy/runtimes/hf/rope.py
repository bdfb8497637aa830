"""The rotary embedding of a model's layers, checked against the model's own code before it is used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy import ops
from kvpolicy.errors import UnsupportedError
from kvpolicy.view import Rope

_CHANGING = ("dynamic", "longrope")


@torch.no_grad()
def layer_ropes(model: PreTrainedModel, modules: dict[int, nn.Module], layers: Sequence[int]) -> dict[int, Rope]:
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
    found: dict[int, Rope] = {}
    for layer in layers:
        types = getattr(config, "layer_types", None)
        kind = types[layer] if types else None
        parameters: Any = getattr(config, "rope_parameters", None) or {}
        parameters = parameters.get(kind, parameters) if kind else parameters
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
        inv_freq = getattr(rotary, "inv_freq", None)
        inv_freq = getattr(rotary, f"{kind}_inv_freq", None) if inv_freq is None else inv_freq
        if inv_freq is None:
            raise UnsupportedError(
                f"{name} keeps no inverse frequencies, so kept keys cannot be un-rotated or re-rotated."
            )
        device = next(modules[layer].parameters()).device
        found[layer] = _verified(modules[layer], rotary, kind, inv_freq.float().to(device), name)
    return found


def _rotary(model: PreTrainedModel, config_type: type) -> nn.Module | None:
    for module in model.modules():
        child = getattr(module, "rotary_emb", None)
        if isinstance(child, nn.Module) and type(getattr(child, "config", None)) is config_type:
            return child
    return None


def _verified(attention: nn.Module, rotary: nn.Module, kind: str | None, inv_freq: Tensor, name: str) -> Rope:
    """Turn a vector with the model's own function and with ours; return the layout that agrees."""
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    dim = int(getattr(attention, "head_dim", 2 * inv_freq.numel()))
    probe = torch.linspace(-1.0, 1.0, dim, device=inv_freq.device).sin().expand(1, 1, 2, dim).contiguous()
    places = torch.tensor([[3, 11]], device=inv_freq.device)
    try:
        extra = (kind,) if hasattr(rotary, f"{kind}_inv_freq") else ()
        cos, sin = rotary(probe, places, *extra)
        turned: Tensor = apply(probe, probe, cos, sin)[1]  # type: ignore[misc]
    except Exception as error:
        raise UnsupportedError(
            f"{name}: its rotary embedding cannot be called in the usual way ({type(error).__name__}), so kept keys "
            "cannot be un-rotated or re-rotated; use a policy that leaves positions alone."
        ) from error
    for interleaved in (False, True):
        rope = Rope(inv_freq, interleaved)
        if torch.allclose(ops.rotate(turned[:, :, :1], rope, torch.tensor(8)), turned[:, :, 1:], atol=1e-4):
            return rope
    raise UnsupportedError(
        f"{name} turns keys in a way that kvpolicy does not know, so kept keys cannot be un-rotated or re-rotated; "
        "use a policy that leaves positions alone."
    )
