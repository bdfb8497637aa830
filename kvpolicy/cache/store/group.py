"""The stores of one cache: layers of the same shape and device share one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kvpolicy.cache.store.arena import ArenaStore
from kvpolicy.cache.store.protocol import Kept, Layout, Rows, counted, equal_lengths
from kvpolicy.cache.store.ragged import BLOCK, RaggedStore, Repacked
from kvpolicy.contracts.components import SlotState
from kvpolicy.types import KeepIndices


class Stores(dict[int, ArenaStore]):
    """Layer index -> store, made when a layer's first keys arrive.

    Args:
        groups: layers that share shape and device, as transformers counts them.
        ragged: heads or layers may hold different numbers of entries.
        bound: most entries per head while decoding, or None when there is no bound.
        states: slot state that moves with the entries.
        re_rotates: kept keys are turned to other positions than their own.

    Attributes:
        slots: slots that an arena has from the beginning, and at least; None where it grows with what is held.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        *,
        ragged: bool,
        bound: int | None,
        states: Sequence[SlotState],
        re_rotates: bool,
    ) -> None:
        super().__init__()
        self.groups = [tuple(group) for group in groups]
        self.ragged, self.bound, self.states, self.re_rotates = ragged, bound, tuple(states), re_rotates
        self.slots: int | None = None

    def distinct(self) -> list[ArenaStore]:
        """Return each store once."""
        return list({id(store): store for store in self.values()}.values())

    def make(self, layer: int, keys: Tensor, values: Tensor) -> ArenaStore:
        """Make the store of a layer and of those that it is grouped with; it has no slots yet.

        Args:
            layer: index of the layer.
            keys, values: its first ones, `[B, H, q, D]` and `[B, H, q, Dv]`.
        """
        group = next(group for group in self.groups if layer in group)
        kind = RaggedStore if self.ragged else ArenaStore
        store = kind(Layout.of(group, keys, values, self.states, re_rotates=self.re_rotates), keys.shape[0])
        for member in group:
            self[member] = store
        return store

    def reserve(self, store: ArenaStore, needed: int, used: int, *, decoding: bool) -> None:
        """Grow so that `needed` slots fit, `used` of which are in use.

        An arena grows by half, so that copies cost a constant share of what is written, and a bounded policy's never
        beyond its bound. The tail behind a ragged base grows by single blocks: what is held is what is allocated.
        """
        if needed <= store.capacity:
            return
        bound = self.bound
        if isinstance(store, RaggedStore) and store.bases:
            capacity = -(-needed // BLOCK) * BLOCK
        elif self.slots is not None and needed <= self.slots:
            capacity = self.slots
        elif bound is not None and needed > bound and not decoding:
            capacity = needed + 1  # a long prompt: it shrinks to the bound after its first compaction
        else:
            capacity = needed + max(needed // 2, 64)
            if bound is not None and needed <= bound:
                capacity = min(capacity, bound)
        store.resize(capacity, min(used, store.capacity))

    def shrink(self, used: int, incoming: int) -> None:
        """Give back what lies behind the bound, once the `used` slots and `incoming` new ones fit into it."""
        bound = self.bound if self.slots is None else self.slots
        for store in self.distinct():
            if bound is not None and store.capacity > bound >= used + incoming:
                store.resize(bound, used)

    def fit(self, used: int) -> None:
        """Give back what lies behind the `used` slots, where no number of slots has been asked for."""
        for store in self.distinct():
            if self.slots is None and store.capacity > used:
                store.resize(used, used)

    def keep(self, rows: Rows, kept: Mapping[int, KeepIndices], counts: Mapping[int, Tensor] | None = None) -> Kept:
        """Let go of everything but the kept slots of these rows, in all layers; see `Store.keep`."""
        read = counted(kept, counts)
        lengths = equal_lengths(rows, read)  # before anything moves, and over all stores
        for store in self.distinct():
            store.keep(rows, {layer: each for layer, each in kept.items() if self[layer] is store}, read)
        return Kept(lengths)

    def repack(self, rows: Rows, decided: Callable[[int], Sequence[Repacked]]) -> Kept:
        """Pack what rows keep into new ragged bases, layer by layer, and empty the tails.

        Args:
            rows: the whole batch, as it is now.
            decided: asked for each layer, one after the other: see `RaggedStore.repack`.
        """
        for layer in sorted(self):
            store = self[layer]
            assert isinstance(store, RaggedStore)
            store.repack(layer, rows, decided(layer))
        for store in self.distinct():
            store.resize(0, 0)
        counts = [self[layer].entries(layer, [0] * len(rows)) for layer in self]
        heads = sum(self[layer].layout.heads for layer in self)
        return Kept(tuple(-(-sum(total) // heads) for total in zip(*counts, strict=True)))

    def drop(self, row: int, slots: Tensor) -> None:
        """Keep only some slots of a row's tail, int64 `[n]` on the CPU, and number what is left `0 ... n-1`."""
        count = slots.numel()
        for store in self.distinct():
            index = slots.to(store.layout.device).expand(1, store.layout.heads, -1)
            lengths = torch.full(index.shape[:2], count, device=index.device)
            for layer in store.layers:
                store.compact(layer, slice(row, row + 1), KeepIndices(index, lengths))
            if count and int(slots[-1]) >= count:  # something stands behind a hidden token
                store.renumber(row, count)

    def take(self, index: Tensor) -> None:
        """Reorder, repeat or select batch rows; `index` int64 `[B']` on any device."""
        for store in self.distinct():
            store.rows(index)

    def clone(self) -> Stores:
        """Return an independent copy."""
        twin = Stores(self.groups, ragged=self.ragged, bound=self.bound, states=self.states, re_rotates=self.re_rotates)
        twin.slots = self.slots
        copies = {id(store): store.clone() for store in self.distinct()}
        twin.update({layer: copies[id(store)] for layer, store in self.items()})
        return twin
