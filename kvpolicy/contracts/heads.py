"""Which of a model's KV heads a tensor holds: all of them, or those of one rank of tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from kvpolicy.errors import UnsupportedError


@dataclass(frozen=True)
class HeadSpan:
    """Neighbouring KV heads of a layer.

    Whatever belongs to a head and not to its content (random numbers, rows of a calibration table) goes by the head's
    number in the model, so that a rank draws and looks up what a process with all heads would.

    Attributes:
        first: number of the first head, as the model counts.
        here: how many there are, the axis `H` of tensors.
        total: KV heads of the whole layer.
    """

    first: int
    here: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.first + self.here <= self.total:
            raise ValueError(
                f"heads {self.first} to {self.first + self.here - 1} are not among {self.total} heads; give first, "
                "here and total with first + here <= total."
            )

    @staticmethod
    def whole(heads: int) -> HeadSpan:
        """Return the span of all heads."""
        return HeadSpan(0, heads, heads)

    def check(self, layer: int, heads: int) -> None:
        """Raise UnsupportedError unless a layer has come with as many heads as are said to be here."""
        if heads != self.here:
            raise UnsupportedError(
                f"layer {layer} was given {heads} KV heads, and tensor parallelism leaves {self.here} of {self.total} "
                "here; use a plan that splits the attention evenly over all ranks."
            )

    @property
    def complete(self) -> bool:
        """Whether no head of the layer is elsewhere."""
        return self.here == self.total

    def numbers(self, device: torch.device) -> Int64[Tensor, " H"]:
        """Return the heads' numbers in the model."""
        return torch.arange(self.first, self.first + self.here, device=device)

    def of(self, all_heads: Tensor, dim: int = 0) -> Tensor:
        """Return the part of a tensor over all heads of the layer (axis `dim`) that belongs to these."""
        return all_heads.narrow(dim, self.first, self.here)
