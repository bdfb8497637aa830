"""Random views for scorers of key statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kvpolicy
from kvpolicy.contracts.view import CacheView, Rope

ROPES = {
    "halves": Rope(torch.tensor([1.0, 0.3, 0.05])),  # of 8 dimensions 2 are not rotated
    "neighbours": Rope(torch.tensor([1.0, 0.3, 0.05, 0.01]), interleaved=True),
}


def make(name: str, kind: Any = "importance", **params: Any) -> Any:
    """A bundled component."""
    return kvpolicy.catalog().get(kind, name)(**params)


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers, fp32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expect(view: CacheView, scores: Tensor, reference: Callable[..., Any], atol: float = 2e-6) -> None:
    """Compare with `reference(b, h, keys, values, positions)`, called with the entries of one head, in float64."""
    assert scores.dtype == torch.float32
    for b in range(view.shape[0]):
        for h in range(view.shape[1]):
            mask = view.valid[b, h]
            wanted = reference(
                b, h, view.keys[b, h][mask].double(), view.values[b, h][mask].double(), view.positions[b, h][mask]
            )
            wanted = torch.as_tensor(wanted, dtype=torch.float64)
            torch.testing.assert_close(scores[b, h][mask].double(), wanted, rtol=2e-5, atol=atol)
            assert (scores[b, h][~mask] == 0).all()


def turned(x: Tensor, rope: Rope, position: int) -> Tensor:
    """The vectors `x` rotated by `position`, one pair after the other."""
    half, out = len(rope.inv_freq), x.double().clone()
    for i, frequency in enumerate(rope.inv_freq.double().tolist()):
        a, b = (2 * i, 2 * i + 1) if rope.interleaved else (i, i + half)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[..., a] = x[..., a].double() * cos - x[..., b].double() * sin
        out[..., b] = x[..., b].double() * cos + x[..., a].double() * sin
    return out
