"""Memory that a component keeps beside the cache's slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SlotState:
    """Memory that is aligned with the cache's slots; the engine extends, gathers, reorders and resets it.

    Attributes:
        name: unique within a policy.
        dtype: torch dtype of the `[B, H, N]` tensor.
        fill: value of a slot that has just been appended.
    """

    name: str
    dtype: torch.dtype = torch.float32
    fill: float = 0.0
