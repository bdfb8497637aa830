"""What the hidden states of new tokens say becomes slot state; the hidden states themselves are not kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.contracts.slot_state import NewTokens
from kvpolicy.policy import checks

if TYPE_CHECKING:
    from kvpolicy.cache.engine import Engine

NEED = "hidden_states"


@torch.no_grad()
def enter(engine: Engine, layer: int, hidden_states: Tensor) -> None:
    """Give the tokens that a layer has just stored the slot state that components make of their hidden states.

    Comes behind `Engine.append` in the same forward pass, and before `Engine.record`.

    Args:
        engine: whose policy has the need ``hidden_states``.
        layer: index of the layer.
        hidden_states: `[B, q, E]`, what its attention reads, padding included; on any device.

    Raises:
        ComponentError: a component returned something else than it declared.
    """
    assert engine.forward is not None
    store = engine.stores[layer]
    layout, plan = store.layout, engine.forward.plan_on(store.layout.device)
    heads = engine.heads.get(layer) or HeadSpan.whole(layout.heads)
    tokens = NewTokens(hidden_states.to(layout.device), layer, engine.num_layers, heads)
    for component in engine.policy.components:
        if NEED not in component.needs:
            continue
        for name, tensor in checks.entering(component.enter(tokens), tokens, component).items():
            store.append_state(layer, name, tensor, plan)
