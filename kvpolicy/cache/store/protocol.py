"""What every store is: tensors that are read, replaced and kept, for rows that somebody else counts.

A store knows a `Layout` and no policy. It is told which rows are meant and how many slots each of them uses (`Rows`),
by the one place that counts them; a store that counts for itself (a paged one) compares, and refuses when they differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from kvpolicy.contracts.components import SlotState
from kvpolicy.errors import UnsupportedError
from kvpolicy.types import KeepIndices

RowId: TypeAlias = Any
"""Name of a row, anything hashable: its index in a batch, or the identifier of a request."""


@dataclass(frozen=True)
class Layout:
    """What all layers of one store have in common.

    Attributes:
        layers: their indices, as transformers counts.
        heads, key_dim, value_dim: sizes of `[H, D]` and `[H, Dv]` for each token.
        dtype, device: of the cached keys and values.
        states: slot state that moves with the entries.
        re_rotates: kept keys are turned to other positions than their own, so that both are stored.
    """

    layers: tuple[int, ...]
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    states: tuple[SlotState, ...] = ()
    re_rotates: bool = False

    @staticmethod
    def of(
        layers: Sequence[int], keys: Tensor, values: Tensor, states: Sequence[SlotState] = (), *, re_rotates: bool
    ) -> Layout:
        """Read it off the first keys `[B, H, q, D]` and values of a layer."""
        sizes = keys.shape[1], keys.shape[-1], values.shape[-1]
        return Layout(tuple(layers), *sizes, keys.dtype, keys.device, tuple(states), re_rotates)

    def check(self, layer: int, keys: Tensor) -> None:
        """Raise UnsupportedError unless new keys `[B, H, q, D]` of a layer are like those that came first."""
        if self.dtype != keys.dtype or self.device != keys.device:
            raise UnsupportedError(
                f"layer {layer} was given {keys.dtype} keys on {keys.device} but its cache is {self.dtype} on "
                f"{self.device}; keep dtype and device of a model while a cache is in use."
            )
        _, heads, _, size = keys.shape
        if heads != self.heads or size != self.key_dim:
            raise UnsupportedError(
                f"layer {layer} has {heads} KV heads of size {size}, unlike the layers that it is grouped with."
            )

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of one key and one value of one KV head."""
        return (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(frozen=True)
class Rows:
    """Some rows, how many slots each of them uses, and small numbers about them, as plain integers.

    All tensors that a compaction makes of these numbers are made here, once per device and for all layers: what is
    copied to an accelerator does not grow with the number of layers.

    Attributes:
        ids: names of the rows, in the order of the tensors' first axis.
        lengths: slots in use of each, at least 0.
        numbers: further integers, one per row, by name (`seen`, `prompt_length`, ...).
    """

    ids: tuple[RowId, ...]
    lengths: tuple[int, ...]
    numbers: tuple[tuple[str, tuple[int, ...]], ...] = ()
    _made: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _used: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(ids: Sequence[RowId], lengths: Sequence[int], **numbers: Sequence[int]) -> Rows:
        """Make one from any sequences."""
        return Rows(tuple(ids), tuple(lengths), tuple((name, tuple(each)) for name, each in numbers.items()))

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def longest(self) -> int:
        """Slots of the longest row, the `N` of what a store reads."""
        return max(self.lengths)

    def on(self, device: torch.device) -> Mapping[str, Tensor]:
        """Return `lengths` and each of `numbers` as int64 `[B]`; one copy to the device, whatever asks how often."""
        if device not in self._made:
            names = ["lengths", *(name for name, _ in self.numbers)]
            table = torch.tensor([self.lengths, *(each for _, each in self.numbers)], dtype=torch.int64, device=device)
            self._made[device] = dict(zip(names, table.unbind(0), strict=True))
        return self._made[device]

    def used(self, device: torch.device) -> Tensor:
        """Return which of the `longest` slots of each row are in use, bool `[B, N]`."""
        if device not in self._used:
            slots = torch.arange(self.longest, device=device)
            self._used[device] = slots < self.on(device)["lengths"][:, None]
        return self._used[device]


@dataclass(frozen=True)
class SlotTensors:
    """All slots of one layer, for some rows.

    Attributes:
        keys, values: `[B, H, N, D]` and `[B, H, N, Dv]`.
        positions, rope_positions: int32 `[B, H, N]`; the same tensor unless kept keys are re-rotated.
        state: slot state by name, `[B, H, N]`.
        valid: bool `[B, H, N]`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    rope_positions: Tensor
    state: Mapping[str, Tensor]
    valid: Tensor

    def arenas(self) -> dict[str, Tensor]:
        """Return everything that moves with a slot, by name; slot state as ``state.NAME``."""
        arenas = {"keys": self.keys, "values": self.values, "positions": self.positions}
        if self.rope_positions is not self.positions:
            arenas["rope_positions"] = self.rope_positions
        return arenas | {f"state.{name}": tensor for name, tensor in self.state.items()}

    @staticmethod
    def of(arenas: Mapping[str, Tensor], valid: Tensor) -> SlotTensors:
        """Put together again what `arenas` took apart."""
        state = {name.removeprefix("state."): t for name, t in arenas.items() if name.startswith("state.")}
        positions = arenas["positions"]
        turned = arenas.get("rope_positions", positions)
        return SlotTensors(arenas["keys"], arenas["values"], positions, turned, state, valid)


@dataclass(frozen=True)
class Kept:
    """What a compaction left.

    Attributes:
        lengths: entries that each row holds per head now, in the order of the rows; counted, not promised. Where
            heads or layers differ it is their mean, rounded up.
        freed: blocks that no row reads any more, by row; empty unless the store is paged.
    """

    lengths: tuple[int, ...]
    freed: Mapping[RowId, tuple[int, ...]] = field(default_factory=dict)


class Store(Protocol):
    """Where the entries of some layers live. It holds tensors and moves them; it decides nothing."""

    @property
    def layout(self) -> Layout:
        """What its layers have in common."""
        ...

    def read(self, layer: int, rows: Rows) -> SlotTensors:
        """Return all slots in use of a layer, `N` = `rows.longest`; not to be written to."""
        ...

    def write(self, layer: int, rows: Rows, changes: Mapping[str, Tensor]) -> None:
        """Replace what a layer holds of some rows, by the names of `SlotTensors.arenas`, `[B, H, N, ...]` each."""
        ...

    def keep(self, rows: Rows, kept: Mapping[int, KeepIndices], counts: Mapping[int, Tensor] | None = None) -> Kept:
        """Let go of everything but the kept slots of these rows, in all layers of the store.

        Args:
            rows: what they hold now.
            kept: by layer, for each of the store's layers.
            counts: how many slots those are, int64 `[B, H]` on the CPU by layer, as `Decision.lengths` has read them;
                without them the device is read here, once.

        Raises:
            UnsupportedError: heads or layers keep different numbers, and the store holds one number per row.
        """
        ...


def counted(kept: Mapping[int, KeepIndices], counts: Mapping[int, Tensor] | None) -> dict[int, Tensor]:
    """Return how many entries each row and head keeps, int64 `[B, H]` on the CPU by layer.

    Args:
        kept: what each layer keeps.
        counts: the same numbers, where the decision has read them; without them the device is read here, once.
    """
    if counts is not None:
        return {layer: counts[layer] for layer in kept}
    home = next(iter(kept.values())).lengths.device
    together = torch.cat([each.lengths.to(home, torch.int64) for each in kept.values()], 1).to("cpu")
    heads = [each.lengths.shape[1] for each in kept.values()]
    return dict(zip(kept, together.split(heads, 1), strict=True))


def equal_lengths(rows: Rows, counts: Mapping[int, Tensor]) -> tuple[int, ...]:
    """Return how many entries each row keeps, where that is one number for all heads and layers.

    Raises:
        UnsupportedError: it is not one number (a policy without the trait `equal_counts`).
    """
    together = torch.cat(list(counts.values()), 1)
    found = []
    for name, low, high in zip(rows.ids, together.amin(1).tolist(), together.amax(1).tolist(), strict=True):
        if low != high:
            raise UnsupportedError(
                f"row {name}: some heads keep {low} entries and others {high}, but this store holds the same number "
                "for all heads and layers (trait equal_counts); use a ragged store, or a policy with equal counts."
            )
        found.append(high)
    return tuple(found)
