"""Ranks of tensor parallelism: each holds some of a layer's heads, and some decisions hang on all of them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """Brings together what the ranks know, wherever heads decide together or share a budget."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors `[..., H, N]` of all ranks side by side, in the order of their heads.

        Every rank calls it the same number of times in the same order. A rank whose heads hold fewer slots than
        another's is padded with zeros (False), so that `N` of the result is the largest.
        """
        ...


class Alone:
    """One process with all heads."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself."""
        return tensor


ALONE = Alone()
"""What everything takes unless a runtime says otherwise."""
