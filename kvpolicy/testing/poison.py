"""Memory that nobody has written: filled with NaN, so that whoever reads it is found out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def fill(tensor: Tensor) -> Tensor:
    """Fill a tensor in place with what should never be read: NaN, the largest integer or True; returns it."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)


def _poisoning(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def empty(*args: Any, **kwargs: Any) -> Tensor:
        return fill(original(*args, **kwargs))

    return empty


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block `torch.empty` and its relatives return tensors full of NaN (largest integer, True).

    Covers `torch.empty`, `torch.empty_like`, `torch.empty_strided`, `Tensor.new_empty`: what Python code asks for. What
    torch allocates for the result of an operation is not touched, for it is written in full.
    """
    places: list[tuple[Any, str]] = [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
    ]
    originals = [getattr(owner, name) for owner, name in places]
    try:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, _poisoning(original))
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
