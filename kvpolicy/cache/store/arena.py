"""Arena store: every head of a row holds the same number of entries, at the front of a preallocated arena."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.cache.store.protocol import Kept, Layout, Rows, SlotTensors, counted, equal_lengths
from kvpolicy.errors import CacheStateError
from kvpolicy.types import KeepIndices

_TOGETHER = {"cpu": 0}  # kept slots that are moved together; plain torch copies them, and a CPU gains nothing by it
_TOGETHER_ELSEWHERE = 1 << 20


@dataclass(frozen=True)
class WritePlan:
    """Where the tokens of one forward pass go; the same for all layers.

    Attributes:
        start: first slot when every row writes the same slots, else None.
        width: columns of the forward pass.
        end: slots in use after the write, the longest row's.
        row, column, slot: int64 `[M]`, one entry per valid token, when rows differ.
        positions: int32 `[width]` (equal rows) or `[M]`: original positions of the tokens.
        rope_positions: likewise, the positions the new keys are rotated to.
    """

    start: int | None
    width: int
    end: int
    positions: Tensor
    rope_positions: Tensor
    row: Tensor | None = None
    column: Tensor | None = None
    slot: Tensor | None = None


class ArenaStore:
    """Keys, values, positions and slot state of some layers, `[L, B, H, capacity, ...]` each, compacted in place.

    Tails behind a row's length hold finite leftovers, never uninitialised memory: attention multiplies them by 0.
    """

    def __init__(self, layout: Layout, batch: int) -> None:
        self.layout = layout
        self.batch = batch
        self.layers = layout.layers
        self.index = {layer: i for i, layer in enumerate(self.layers)}
        self.states = layout.states
        self.capacity = 0
        lead, device = (len(self.layers), batch, layout.heads, 0), layout.device
        self.keys = torch.zeros(*lead, layout.key_dim, dtype=layout.dtype, device=device)
        self.values = torch.zeros(*lead, layout.value_dim, dtype=layout.dtype, device=device)
        self.positions = torch.zeros(lead, dtype=torch.int32, device=device)
        self.rope_positions = torch.zeros_like(self.positions) if layout.re_rotates else self.positions
        self.state = {s.name: torch.zeros(lead, dtype=s.dtype, device=device) for s in self.states}
        self._open: list[tuple[Tensor, ...]] = []

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every arena by `change` of it."""
        shared = self.rope_positions is self.positions
        self._open = []  # views would keep the old arenas
        # One after the other, so that only one is there twice at a time.
        self.keys = change(self.keys)
        self.values = change(self.values)
        self.positions = change(self.positions)
        self.rope_positions = self.positions if shared else change(self.rope_positions)
        self.state = {name: change(tensor) for name, tensor in self.state.items()}

    def resize(self, capacity: int, used: int) -> None:
        """Give every arena `capacity` slots, keeping the first `used`."""

        def change(old: Tensor) -> Tensor:
            new = old.new_zeros(*old.shape[:3], capacity, *old.shape[4:])
            new[:, :, :, :used].copy_(old[:, :, :, :used])
            return new

        self._each(change)
        self.capacity = capacity

    def rows(self, index: Tensor) -> None:
        """Reorder, repeat or select batch rows; `index` int64 `[B']` on any device."""
        index = index.to(self.layout.device)
        self._each(lambda old: old.index_select(1, index))
        self.batch = index.numel()

    def clone(self) -> Self:
        """Return an independent copy."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._each(torch.clone)
        return twin

    def append_slots(self, plan: WritePlan) -> None:
        """Write positions and fresh slot state of the new tokens, for all layers at once; `append` follows."""
        arenas = [self.keys, self.values]
        used = [arena.narrow(3, 0, plan.end).unbind(0) for arena in arenas]
        if plan.start is None:
            self._open = list(zip(*used, strict=True))
        else:
            # All layers' views at once: making them for one layer of one token at a time is measurable.
            new = [arena.narrow(3, plan.start, plan.width).unbind(0) for arena in arenas]
            self._open = list(zip(*used, *new, strict=True))
        self.mark_slots(plan)

    def mark_slots(self, plan: WritePlan) -> None:
        """Write positions and fresh slot state of the new tokens; their keys and values come by another way."""
        fills = [(self.state[s.name], s.fill) for s in self.states]
        if plan.start is not None:
            span = slice(plan.start, plan.start + plan.width)
            self.positions[:, :, :, span] = plan.positions
            if self.rope_positions is not self.positions:
                self.rope_positions[:, :, :, span] = plan.rope_positions
            for tensor, fill in fills:
                tensor[:, :, :, span] = fill
            return
        row, slot = plan.row, plan.slot
        # Advanced indices that are kept apart by a slice come first in the result: [M, L, H].
        self.positions[:, row, :, slot] = plan.positions[:, None, None]
        if self.rope_positions is not self.positions:
            self.rope_positions[:, row, :, slot] = plan.rope_positions[:, None, None]
        for tensor, fill in fills:
            tensor[:, row, :, slot] = fill

    def append(self, layer: int, keys: Tensor, values: Tensor, plan: WritePlan) -> tuple[Tensor, Tensor]:
        """Copy one layer's new keys `[B, H, q, D]` and values into place; return views over all slots in use.

        Args:
            layer: index of the layer as transformers counts.
            keys, values: what is new.
            plan: the one that `append_slots` was given last.
        """
        all_keys, all_values, *new = self._open[self.index[layer]]
        if new:
            torch._foreach_copy_(new, (keys, values))
        else:
            row, column, slot = plan.row, plan.column, plan.slot
            all_keys[row, :, slot] = keys[row, :, column]
            all_values[row, :, slot] = values[row, :, column]
        return all_keys, all_values

    def append_state(self, layer: int, name: str, new: Tensor, plan: WritePlan) -> None:
        """Copy slot state `[B, H, q]` of one layer's new tokens into place; `plan` is that of their `append`."""
        arena = self.state[name][self.index[layer]]
        if plan.start is not None:
            arena[:, :, plan.start : plan.start + plan.width] = new
        else:
            arena[plan.row, :, plan.slot] = new[plan.row, :, plan.column]

    def read(self, layer: int, rows: Rows) -> SlotTensors:
        """Return all slots in use of a layer, without copying; `rows` are neighbours in the batch."""
        i, part, end = self.index[layer], neighbours(rows), rows.longest
        positions = self.positions[i, part, :, :end]
        turned = positions if self.rope_positions is self.positions else self.rope_positions[i, part, :, :end]
        return SlotTensors(
            self.keys[i, part, :, :end],
            self.values[i, part, :, :end],
            positions,
            turned,
            {name: tensor[i, part, :, :end] for name, tensor in self.state.items()},
            rows.used(self.layout.device)[:, None].expand(-1, self.layout.heads, -1),
        )

    def write(self, layer: int, rows: Rows, changes: Mapping[str, Tensor]) -> None:
        """Replace arenas of a layer's first slots by name (see `SlotTensors.arenas`), `[B, H, N, ...]` each."""
        arenas = {"keys": self.keys, "values": self.values, "rope_positions": self.rope_positions}
        arenas |= {f"state.{name}": tensor for name, tensor in self.state.items()}
        for name, tensor in changes.items():
            arenas[name][self.index[layer], neighbours(rows), :, : tensor.shape[2]].copy_(tensor)

    def part_rotations(self) -> None:
        """Store from now on which position each key is rotated to, apart from the position that its token has."""
        if self.rope_positions is self.positions:
            self.rope_positions = self.positions.clone()

    def renumber(self, row: int, count: int) -> None:
        """Give the first `count` slots of a row the positions `0 ... count-1`; their keys stay rotated as they are."""
        self.part_rotations()
        self.positions[:, row, :, :count] = torch.arange(count, dtype=torch.int32, device=self.layout.device)

    def keep(self, rows: Rows, kept: Mapping[int, KeepIndices], counts: Mapping[int, Tensor] | None = None) -> Kept:
        """Move the kept slots of these rows to the front, in all layers; see `Store.keep`."""
        lengths = equal_lengths(rows, counted(kept, counts))
        self._compact_layers(neighbours(rows), kept)
        return Kept(lengths)

    def compact(self, layer: int, rows: slice, kept: KeepIndices) -> None:
        """Move the kept slots of these rows to the front, keys, values, positions and slot state alike."""
        for arena in self._arenas():
            ops.compact(arena[self.index[layer], rows], kept)

    def _compact_layers(self, rows: slice, keeps: Mapping[int, KeepIndices]) -> None:
        """As `compact` for all layers, on an accelerator many at once: one launch for each arena, not for each layer.

        Args:
            rows: all rows, or one.
            keeps: what each layer keeps.
        """
        slots = max(kept.indices.numel() for kept in keeps.values())
        step = max(1, _TOGETHER.get(self.layout.device.type, _TOGETHER_ELSEWHERE) // max(slots, 1))
        if len({kept.indices.shape for kept in keeps.values()}) > 1:
            step = 1
        for first in range(0, len(self.layers), step):
            some = self.layers[first : first + step]
            if len(some) == 1:
                self.compact(some[0], rows, keeps[some[0]])
                continue
            indices, lengths = (torch.cat(parts) for parts in zip(*(keeps[layer] for layer in some), strict=True))
            for arena in self._arenas():
                part = arena[first : first + step, rows]
                ops.compact(part.view(-1, *part.shape[2:]), KeepIndices(indices, lengths))

    def _arenas(self) -> list[Tensor]:
        turned = [] if self.rope_positions is self.positions else [self.rope_positions]
        return [self.keys, self.values, self.positions, *self.state.values(), *turned]

    def entries(self, layer: int, lengths: Sequence[int]) -> list[int]:
        """Return the entries that each row of a layer holds, over all heads; `lengths` are its slots in use."""
        return [n * self.layout.heads for n in lengths]

    def bytes_allocated(self, layer: int) -> tuple[int, int]:
        """Return the bytes of the tensors that hold a layer: keys and values, and metadata (positions, slot state)."""
        i = self.index[layer]
        sizes = [arena[i].numel() * arena.element_size() for arena in self._arenas()]
        return sum(sizes[:2]), sum(sizes[2:])


def neighbours(rows: Rows) -> slice:
    """Return rows of a batch as a slice, so that what is read of them is a view."""
    numbers = [row for row in rows.ids if isinstance(row, int)]
    first = numbers[0] if numbers else 0
    if numbers != list(range(first, first + len(rows.ids))):
        raise CacheStateError(
            f"rows {str(rows.ids)[:60]} do not lie side by side in the batch; ask for them one by one."
        )
    return slice(first, first + len(numbers))
