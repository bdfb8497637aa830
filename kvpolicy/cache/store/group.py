"""The stores of one cache: layers of the same shape and device share one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvpolicy.cache.store.arena import DenseStore, Shape
from kvpolicy.cache.store.ragged import BLOCK, RaggedStore
from kvpolicy.policy.policy import Policy
from kvpolicy.types import KeepIndices

_EAGER_SLOTS = 4096  # a bounded policy up to this size gets its whole arena at once


class Stores(dict[int, DenseStore]):
    """Layer index -> store, made when a layer's first keys arrive.

    Args:
        policy: what the stores are for; ragged ones if it leaves heads or layers with different counts.
        groups: layers that share shape and device, as transformers counts them.
    """

    def __init__(self, policy: Policy, groups: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.policy = policy
        self.groups = [tuple(group) for group in groups]
        self.ragged = policy.counts != "equal"

    def distinct(self) -> list[DenseStore]:
        """Return each store once."""
        return list({id(store): store for store in self.values()}.values())

    def make(self, layer: int, shape: Shape) -> DenseStore:
        """Make the store of a layer and of those that it is grouped with; it has no slots yet."""
        group = next(group for group in self.groups if layer in group)
        kind = RaggedStore if self.ragged else DenseStore
        re_rotates = any(post.changes == "positions" for post in self.policy.post)
        store = kind(group, shape, self.policy.slot_states, re_rotates=re_rotates)
        for member in group:
            self[member] = store
        return store

    def reserve(self, store: DenseStore, needed: int, used: int, *, decoding: bool) -> None:
        """Grow so that `needed` slots fit, `used` of which are in use.

        A bounded policy gets all of its bound at once, an unbounded one grows geometrically, and the tail behind a
        ragged base by single blocks, so that what is held is what is allocated.
        """
        if needed <= store.capacity:
            return
        bound = self.policy.bound
        if isinstance(store, RaggedStore) and store.bases:
            capacity = -(-needed // BLOCK) * BLOCK
        elif bound is not None and needed <= bound:
            capacity = min(bound, max(needed + needed // 2, _EAGER_SLOTS))
        elif bound is not None and not decoding:
            capacity = needed + 1  # a long prompt: it shrinks to the bound after its first compaction
        else:
            capacity = needed + max(needed // 2, 64)
        store.resize(capacity, min(used, store.capacity))

    def shrink(self, used: int, incoming: int) -> None:
        """Give back what lies behind the policy's bound, once the `used` slots and `incoming` new ones fit into it."""
        bound = self.policy.bound
        for store in self.distinct():
            if bound is not None and store.capacity > bound >= used + incoming:
                store.resize(bound, used)

    def compact(self, layers: Sequence[int], rows: slice, keeps: Sequence[KeepIndices]) -> None:
        """Move what each layer keeps of all rows, or of one, to the front."""
        for store in self.distinct():
            pairs = zip(layers, keeps, strict=True)
            store.compact_layers(rows, {layer: kept for layer, kept in pairs if self[layer] is store})

    def take(self, index: Tensor) -> None:
        """Reorder, repeat or select batch rows; `index` int64 `[B']` on any device."""
        for store in self.distinct():
            store.rows(index)

    def clone(self) -> Stores:
        """Return an independent copy."""
        twin = Stores(self.policy, self.groups)
        copies = {id(store): store.clone() for store in self.distinct()}
        twin.update({layer: copies[id(store)] for layer, store in self.items()})
        return twin
