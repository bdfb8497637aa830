"""Stand-ins for calibration tables: they fit every view, so that laws can try components that read a table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from kvpolicy.contracts.components import Component
from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.contracts.view import CacheView
from kvpolicy.policy.policy import Policy
from kvpolicy.tables import Table, TableOf, supplying

NAMES: Final = ("stand-in/one", "stand-in/two")
"""Names to draw from; inside `stand_in_tables` any name will do."""

_GROUPS: Final = 2
_FRACTIONS: Final = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class StandIn(Table):
    """Random numbers that depend on the name, the tensor, the layer and the head, for a model of any shape."""

    def __post_init__(self) -> None:
        """Nothing to check: the numbers are drawn when a view or a request says how many."""

    def check_model(
        self, num_layers: int, num_kv_heads: int, head_dim: int | None = None, hidden_size: int | None = None
    ) -> None:
        """Fit every model."""

    def of_layer(self, layer_idx: int, heads: HeadSpan, hidden_size: int, device: torch.device) -> dict[str, Tensor]:
        """Return a gate without hidden maps: ``output_weight`` `[H, E]` and ``output_bias`` `[H]`."""
        weight = self._layer("output_weight", layer_idx, heads, hidden_size, 1)
        return {
            "output_weight": weight.to(device),
            "output_bias": self._layer("output_bias", layer_idx, heads, 1, 1).to(device),
        }

    def layer(self, name: str, view: CacheView) -> Tensor:
        """Return `[H, ...]` for the view."""
        half = view.keys.shape[-1] // 2 if view.rope is None else len(view.rope.inv_freq)
        return self._layer(name, view.layer_idx, view.head_span, view.keys.shape[-1], half).to(view.device)

    def rows(
        self, name: str, layers: Sequence[int], num_layers: int, num_kv_heads: int, device: torch.device
    ) -> Tensor:
        """Return `[len(layers), H]`, or `[P, len(layers), H]` for ``kept``."""
        whole = HeadSpan.whole(num_kv_heads)
        every: Tensor = torch.stack([self._layer(name, index, whole, 1, 1) for index in range(num_layers)])
        if name == "kept":
            mean = torch.tensor(_FRACTIONS).view(-1, 1, 1)  # u - mean(u) is within +-1, so the share is within 0..1
            kept = mean + mean * (1 - mean) * (every - every.mean())
            return kept[:, list(layers)].to(device)
        return every[list(layers)].to(device)

    def _layer(self, name: str, layer: int, heads: HeadSpan, dim: int, half: int) -> Tensor:
        numbers = range(heads.first, heads.first + heads.here)
        return torch.stack([self._head(name, f"{layer}/{head}", dim, half) for head in numbers])

    def _head(self, name: str, place: str, dim: int, half: int) -> Tensor:
        def drawn(what: str, *shape: int) -> Tensor:
            seed = hashlib.sha256(f"{self.source}/{what}/{place}".encode()).digest()
            return torch.rand(shape, generator=torch.Generator().manual_seed(int.from_bytes(seed[:4], "big")))

        if name in ("filters", "output_weight"):
            return drawn(name, dim) * 2 - 1
        mean = drawn("mean", _GROUPS, half, 2) * 2 - 1
        if name == "mean":
            return mean
        if name == "magnitude":  # never below the magnitude of the mean
            least: Tensor = torch.linalg.vector_norm(mean, dim=-1)
            return least + drawn(name, _GROUPS, half)
        return drawn(name)


def stand_in(name: str, kind: str) -> Table:
    """Return the stand-in of a kind; the same numbers for the same name."""
    tensors = {"fractions": torch.tensor(_FRACTIONS)} if kind == "head_curves" else {}
    scores = name == NAMES[0] or "kvzap" in name
    notes = {"output": "score" if scores else "retention"} if kind == "gates" else {}
    return StandIn(kind, "any", "stand-in", 1, 1, 1, tensors, source=name, notes=notes)


def stand_in_tables() -> AbstractContextManager[None]:
    """Make every table a stand-in inside the block."""
    return supplying(stand_in)


def reads_tables(subject: Component | Policy) -> bool:
    """Say whether a component, a policy or a part of it has a parameter that names a table."""
    return any(True for member in _members(subject) for _ in table_fields(type(member)))


def _members(subject: Component | Policy) -> Iterator[Component]:
    yield from subject.components if isinstance(subject, Policy) else subject.members()


def table_fields(component: type[Component]) -> Iterator[str]:
    """Yield the parameters of a component that name a table."""
    for name, field in component.model_fields.items():
        if any(isinstance(mark, TableOf) for mark in field.metadata):
            yield name
