"""What a law hands to its subject: one or more layers of a cache, and what goes with them, as one value.

`Case` is plain data, so that a failing one can be printed as a test. Its methods are the transformations that laws
speak of; each returns a new case and writes to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from kvpolicy.contracts.view import CacheView
from kvpolicy.testing import poison
from kvpolicy.types import KeepIndices

_BY_SLOT = ("keys", "values", "positions", "valid", "rope_positions")
_BY_ROW = ("prompt_length", "seen", "compaction", "budget", "query_positions", "query_valid")
_EXTRAS_BY_SLOT = ("modality",)
_EXTRAS_BY_ROW = ("query_count", "query_mean", "query_covariance")
_EXTRAS_BY_HEAD = {"query_mean": 1, "query_covariance": 1, "output_projection": 0}
"""Name -> axis of the KV heads."""


@dataclass(frozen=True)
class Layer:
    """One layer of a case.

    Attributes:
        view: what the subject may look at.
        aligned: further `[B, H, N]` tensors by name: ``importance`` and ``redundancy`` for a mixer, ``scores`` and
            ``protected`` for a selector or an allocator, ``kept`` for a post-operation.
    """

    view: CacheView
    aligned: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Input of a component or a policy.

    Attributes:
        layers: one for a component, one or more for an allocator or a policy; all have the same rows.
        counts: int64 `[B, H]`, what a selector keeps.
        budget: entries per head and layer to keep, by row, for an allocator or a policy.
    """

    layers: tuple[Layer, ...]
    counts: Tensor | None = None
    budget: tuple[int, ...] = ()

    @property
    def view(self) -> CacheView:
        """The view of the first layer."""
        return self.layers[0].view

    @property
    def views(self) -> list[CacheView]:
        """The views of all layers; they show the budget that the case has."""
        views = [layer.view for layer in self.layers]
        budget = torch.tensor(self.budget)
        return [replace(view, budget=budget) for view in views] if self.budget else views

    @property
    def valid(self) -> list[Tensor]:
        """Bool `[B, H, N]` per layer."""
        return [layer.view.valid for layer in self.layers]

    @property
    def rows(self) -> int:
        """Batch rows."""
        return self.view.shape[0]

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.view.shape[1]

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Return every tensor in the case with a name for messages."""
        found = [] if self.counts is None else [("counts", self.counts)]
        for i, layer in enumerate(self.layers):
            at = f" of layer {i}" if len(self.layers) > 1 else ""
            pairs = [(f.name, getattr(layer.view, f.name)) for f in fields(layer.view)]
            pairs += [(f"state {name!r}", t) for name, t in layer.view.state.items()]
            pairs += [(f"extras {name!r}", t) for name, t in layer.view.extras.items()]
            pairs += [*layer.aligned.items()]
            found += [(name + at, value) for name, value in pairs if isinstance(value, Tensor)]
        return found

    def by_slot(self, change: Callable[[Tensor, Tensor], Tensor]) -> Case:
        """Replace every slot-aligned tensor `x` by `change(x, valid)`; `valid` itself stays what it says."""

        def changed(layer: Layer) -> Layer:
            view, valid = layer.view, layer.view.valid
            new: dict[str, Any] = {n: change(x, valid) for n in _BY_SLOT if isinstance(x := getattr(view, n), Tensor)}
            state = {name: change(x, valid) for name, x in view.state.items()}
            extras = {n: change(x, valid) if n in _EXTRAS_BY_SLOT else x for n, x in view.extras.items()}
            aligned = {name: change(x, valid) for name, x in layer.aligned.items()}
            return Layer(replace(view, **new, state=state, extras=extras), aligned)

        return replace(self, layers=tuple(changed(layer) for layer in self.layers))

    def by_view(self, change: Callable[[CacheView], CacheView]) -> Case:
        """Replace every view."""
        return replace(self, layers=tuple(replace(layer, view=change(layer.view)) for layer in self.layers))

    def with_heads(self, order: Sequence[int]) -> Case:
        """Take the KV heads in another order."""
        index = torch.tensor(list(order))
        case = self.by_slot(lambda x, _valid: x[:, index])

        def queries(view: CacheView) -> CacheView:
            sinks = view.attention_sinks
            asked = view.queries
            axes = [(name, axis) for name, axis in _EXTRAS_BY_HEAD.items() if name in view.extras]
            moved = {name: view.extras[name].index_select(axis, index) for name, axis in axes}
            return replace(
                view,
                queries=None if asked is None else asked[:, index],
                attention_sinks=None if sinks is None else sinks[index],
                extras={**view.extras, **moved},
            )

        return replace(case.by_view(queries), counts=None if self.counts is None else self.counts[:, index])

    def with_rows(self, order: Sequence[int]) -> Case:
        """Take some rows, in this order."""
        index = torch.tensor(list(order))
        case = self.by_slot(lambda x, _valid: x[index])

        def rest(view: CacheView) -> CacheView:
            names = (n for n in _BY_ROW if getattr(view, n) is not None)
            queries = None if view.queries is None else view.queries[index]
            extras = {n: t[index] if n in _EXTRAS_BY_ROW else t for n, t in view.extras.items()}
            return replace(view, queries=queries, extras=extras, **{n: getattr(view, n)[index] for n in names})

        counts = None if self.counts is None else self.counts[index]
        return replace(case.by_view(rest), counts=counts, budget=tuple(self.budget[b] for b in order if self.budget))

    def at_slots(self, index: Tensor) -> Case:
        """Take the slots `index` `[K]`, the same of every row and head."""
        return self.by_slot(lambda x, _valid: x[:, :, index])

    def without_padding(self) -> Case:
        """Leave out the slots that are valid nowhere."""
        return self.at_slots(torch.stack([v.flatten(0, 1).any(0) for v in self.valid]).any(0).nonzero()[:, 0])

    def with_padding(self, left: int, right: int) -> Case:
        """Put invalid slots, full of NaN, before and behind the others."""

        def padded(x: Tensor, _valid: Tensor) -> Tensor:
            def pads(count: int) -> Tensor:
                blank = x.new_zeros(*x.shape[:2], count, *x.shape[3:])
                return blank if x.dtype == torch.bool else poison.fill(blank)

            return torch.cat([pads(left), x, pads(right)], dim=2)

        return self.by_slot(padded)

    def with_garbage(self, garbage: float) -> Case:
        """Put `garbage` (NaN included) where no slot is valid; integers become -1 or the largest there is."""

        def spoilt(x: Tensor, valid: Tensor) -> Tensor:
            if x.dtype == torch.bool:  # masks name valid slots only
                return x & valid
            mask = ~valid.reshape(*valid.shape, *[1] * (x.dim() - 3))
            if x.is_floating_point():
                return x.masked_fill(mask, garbage)
            return x.masked_fill(mask, -1 if garbage <= 0 else torch.iinfo(x.dtype).max)

        return self.by_slot(spoilt)

    def with_dtype(self, dtype: torch.dtype, factor: float = 1.0) -> Case:
        """Scale keys, values and queries and cast them, and the model's weights with them."""

        def cast(view: CacheView) -> CacheView:
            queries = None if view.queries is None else (view.queries * factor).to(dtype)
            extras = {n: t.to(dtype) if n == "output_projection" else t for n, t in view.extras.items()}
            keys, values = (view.keys * factor).to(dtype), (view.values * factor).to(dtype)
            return replace(view, keys=keys, values=values, queries=queries, extras=extras)

        return self.by_view(cast)

    def non_contiguous(self) -> Case:
        """Hold the same numbers as slices of larger tensors, surrounded by NaN."""

        def strided(x: Tensor, _valid: Tensor | None = None) -> Tensor:
            room = [n + 2 for n in x.shape[:-1]] + [2 * x.shape[-1] + 1]
            arena = poison.fill(torch.zeros(room, dtype=x.dtype))
            inside = arena[tuple(slice(1, -1) for _ in x.shape[:-1])][..., 1::2]
            inside.copy_(x)
            return inside

        def rest(view: CacheView) -> CacheView:
            extras = {name: strided(t) for name, t in view.extras.items()}
            return replace(view, queries=None if view.queries is None else strided(view.queries), extras=extras)

        return self.by_slot(strided).by_view(rest)

    def jittered(self, seed: int, size: float = 2e-6) -> Case:
        """Change keys, values, queries, state and extras by some units of rounding, to see whether rounding decides."""
        generator = torch.Generator().manual_seed(seed)

        def moved(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x
            return (x.float() * (1 + size * torch.randn(x.shape, generator=generator))).to(x.dtype)

        def change(view: CacheView) -> CacheView:
            queries = None if view.queries is None else moved(view.queries)
            state = {name: moved(x) for name, x in view.state.items()}
            extras = {name: moved(x) for name, x in view.extras.items()}
            keys, values = moved(view.keys), moved(view.values)
            return replace(view, keys=keys, values=values, queries=queries, state=state, extras=extras)

        return self.by_view(change)


def keep_indices(kept: Tensor) -> KeepIndices:
    """Turn a bool mask `[B, H, N]` into the slots it marks, padded with the last of them."""
    lengths = kept.sum(-1)
    width = int(lengths.max()) if lengths.numel() else 0
    indices = torch.zeros(*kept.shape[:2], width, dtype=torch.int64)
    for b in range(kept.shape[0]):
        for h in range(kept.shape[1]):
            slots = kept[b, h].nonzero()[:, 0]
            indices[b, h, : len(slots)] = slots
            indices[b, h, len(slots) :] = slots[-1] if len(slots) else 0
    return KeepIndices(indices, lengths)
