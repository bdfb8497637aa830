"""Memory that a component keeps beside the cache's slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvpolicy.contracts.heads import HeadSpan


@dataclass(frozen=True)
class SlotState:
    """Memory that is aligned with the cache's slots; the engine extends, gathers, reorders and resets it.

    Attributes:
        name: unique within a policy.
        dtype: torch dtype of the `[B, H, N]` tensor.
        fill: value of a slot that has just been appended, before `Component.enter` says another.
    """

    name: str
    dtype: torch.dtype = torch.float32
    fill: float = 0.0


@dataclass(frozen=True)
class NewTokens:
    """Tokens that have just entered one layer, to the components that give them slot state (`Component.enter`).

    What a component returns for a token may hang on that token alone: a prompt comes whole or in chunks, and a row with
    others or by itself. Tokens that are padding are among them, may hold anything, and are not stored.

    Attributes:
        hidden_states: `[B, q, E]`, what the layer's attention reads (behind the layer's input norm, where there is
            one), in the model's dtype.
        layer_idx: index of the layer as transformers counts.
        num_layers: layers of the model.
        heads: which of the model's KV heads the layer holds here.
    """

    hidden_states: Float[Tensor, "B q E"]
    layer_idx: int
    num_layers: int
    heads: HeadSpan

    @property
    def shape(self) -> tuple[int, int, int]:
        """`[B, H, q]`, the shape of the state of these tokens."""
        return self.hidden_states.shape[0], self.heads.here, self.hidden_states.shape[1]
