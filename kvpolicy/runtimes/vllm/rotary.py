"""The rotary embedding of vLLM's layers, compared with the table that vLLM turns keys by."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from kvpolicy.contracts.view import Rope
from kvpolicy.errors import UnsupportedError

_TOLERANCE = 0.02  # of a unit: tables in bfloat16 agree to 1 %, another rotation is off by more


def rope_of(model: nn.Module, layer: Any, device: torch.device) -> Rope:
    """Return the rotary embedding of one of vLLM's attention layers.

    Raises:
        UnsupportedError: the layer has none, or turns its keys in another way than by angles that grow with position.
    """
    name, module = str(layer.layer_name), _rotary(model, layer)
    table = getattr(module, "cos_sin_cache", None)
    if module is None or not isinstance(table, Tensor) or table.dim() != 2:
        raise UnsupportedError(
            f"{name} has no rotary embedding that is known here, so kept keys cannot be un-rotated; use a policy that "
            "leaves positions alone."
        )
    inv_freq = module._compute_inv_freq(module.base).float().cpu()
    places = (1, 11, min(1009, table.shape[0] - 1))
    wanted = _angles(tuple(inv_freq.tolist()), places)
    found = table[list(places)].double().cpu()
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=0, atol=_TOLERANCE):
        raise UnsupportedError(
            f"{name} turns its keys in a way that kvpolicy does not know ({type(module).__name__}), so kept keys "
            "cannot be un-rotated; use a policy that leaves positions alone."
        )
    return Rope(inv_freq.to(device), interleaved=not module.is_neox_style)


def _rotary(model: nn.Module, layer: Any) -> Any:
    """Return the rotary embedding of the module that a layer is part of."""
    return next(
        (
            module.rotary_emb
            for module in model.modules()
            if getattr(module, "rotary_emb", None) is not None and any(each is layer for each in module.children())
        ),
        None,
    )


@lru_cache(maxsize=8)
def _angles(inv_freq: tuple[float, ...], places: tuple[int, ...]) -> Tensor:
    """Return cosines and sines at some positions, fp64 `[places, R]`."""
    angles = torch.tensor(places, dtype=torch.float64)[:, None] * torch.tensor(inv_freq, dtype=torch.float64)
    return torch.cat([angles.cos(), angles.sin()], -1)
