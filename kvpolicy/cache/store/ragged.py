"""Ragged store: heads and layers hold different numbers of entries, and the memory of the others is really freed.

What a compaction kept lies in flat blocks, head after head (the *base*). Tokens that came since lie in a dense arena
(the *tail*), the same number for every head, until the next compaction moves what it keeps into a new base. Before the
first one there is only the tail, and the store is an arena.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kvpolicy.cache.store.arena import ArenaStore, neighbours
from kvpolicy.cache.store.protocol import Kept, Layout, Rows, SlotTensors, counted
from kvpolicy.errors import CacheStateError
from kvpolicy.ops.ragged import Blocks
from kvpolicy.types import Counts, KeepIndices, Mask

BLOCK = 16  # slots per block: what a head may hold more than its entries


@dataclass(frozen=True)
class Base:
    """What one layer kept at the last compaction.

    Attributes:
        counts: int64 `[B, H]`, entries per head.
        known: the same as plain integers, so that nobody needs to read them.
        arenas: flat `[M, BLOCK, ...]` by name: keys, values, positions, perhaps rope_positions, and slot state.
        owner: int64 `[M]`, `row * H + head` of each block, ascending.
        filled: int64 `[M]`, entries in each block.
    """

    counts: Counts
    known: list[list[int]]
    arenas: dict[str, Tensor]
    owner: Tensor
    filled: Tensor

    @property
    def most(self) -> int:
        """The largest count."""
        return max((count for row in self.known for count in row), default=0)

    @staticmethod
    def of(slots: SlotTensors, kept: Mask, known: list[list[int]] | None = None) -> Base:
        """Pack the kept slots of a layer.

        Args:
            slots: what the layer holds.
            kept: bool `[B, H, N]`.
            known: how many each row and head keeps; without it the device is read.
        """
        batch, heads, _ = kept.shape
        counts = kept.sum(-1)
        known = counts.tolist() if known is None else known
        total = sum(-(-count // BLOCK) for row in known for count in row)
        blocks = (counts.flatten() + BLOCK - 1) // BLOCK
        first = blocks.cumsum(0) - blocks
        every = torch.arange(batch * heads, device=kept.device)
        owner = torch.repeat_interleave(every, blocks, output_size=total)
        number = torch.arange(owner.numel(), device=kept.device) - first[owner]
        filled = (counts.flatten()[owner] - number * BLOCK).clamp(max=BLOCK)
        # What goes is written behind the last block: picking out what stays would ask the device how much that is.
        at = first.view(batch, heads, 1) * BLOCK + kept.cumsum(-1) - 1
        at = torch.where(kept, at, total * BLOCK).flatten()

        def pack(tensor: Tensor) -> Tensor:
            flat = tensor.new_zeros(total * BLOCK + 1, *tensor.shape[3:])
            flat.index_copy_(0, at, tensor.flatten(0, 2))
            return flat[:-1].view(-1, BLOCK, *tensor.shape[3:])

        arenas = {name: pack(tensor) for name, tensor in slots.arenas().items()}
        return Base(counts, known, arenas, owner, filled)

    def places(self) -> tuple[Tensor, Tensor]:
        """Return for each of `[B, H, most]` slots its place in the flat arenas, and whether it holds an entry."""
        batch, heads = self.counts.shape
        blocks = (self.counts.flatten() + BLOCK - 1) // BLOCK
        first = ((blocks.cumsum(0) - blocks) * BLOCK).view(batch, heads, 1)
        slot = torch.arange(self.most, device=self.counts.device)
        held = slot < self.counts.unsqueeze(-1)
        return torch.where(held, first + slot, 0), held

    def take(self, index: Tensor) -> Base:
        """Return the base of the rows `index`, int64 `[B']`."""
        batch, heads = self.counts.shape
        of_row = [(self.owner // heads == b).nonzero()[:, 0] for b in range(batch)]
        order = torch.cat([of_row[b] for b in index.tolist()])
        rows = torch.cat([torch.full_like(of_row[b], i) for i, b in enumerate(index.tolist())])
        return Base(
            self.counts.index_select(0, index),
            [list(self.known[b]) for b in index.tolist()],
            {name: arena.index_select(0, order) for name, arena in self.arenas.items()},
            rows * heads + self.owner[order] % heads,
            self.filled[order],
        )

    @property
    def blocks(self) -> Blocks:
        """Return what attention reads."""
        return Blocks(self.arenas["keys"], self.arenas["values"], self.owner, self.filled)


class Repacked(NamedTuple):
    """What some neighbouring rows of a layer keep.

    Attributes:
        rows: which.
        kept: their slots that stay.
        counts: how many those are, int64 `[B, H]` on the CPU.
        changes: replacements by the names of `SlotTensors.arenas`, `[B, H, N, ...]`, made before anything moves.
    """

    rows: slice
    kept: KeepIndices
    counts: Counts
    changes: Mapping[str, Tensor]


class RaggedStore(ArenaStore):
    """An arena store whose compactions go into a ragged base per layer."""

    def __init__(self, layout: Layout, batch: int) -> None:
        super().__init__(layout, batch)
        self.bases: dict[int, Base] = {}

    def base(self, layer: int) -> Base | None:
        """Return what the layer kept at its last compaction."""
        return self.bases.get(layer)

    def read(self, layer: int, rows: Rows) -> SlotTensors:
        """Return all slots of a layer, the base's padded to its longest head; copies, once there is a base.

        `rows.lengths` are slots in use of the tails.
        """
        recent = super().read(layer, rows)
        base = self.bases.get(layer)
        if base is None:
            return recent
        places, held = base.places()
        part = neighbours(rows)
        places, held = places[part], held[part]

        def joined(name: str, tensor: Tensor) -> Tensor:
            return torch.cat([base.arenas[name].flatten(0, 1)[places], tensor], 2)

        arenas = {name: joined(name, tensor) for name, tensor in recent.arenas().items()}
        return SlotTensors.of(arenas, torch.cat([held, recent.valid], 2))

    def write(self, layer: int, rows: Rows, changes: Mapping[str, Tensor]) -> None:
        """Replace arenas by name, slots as `read` gives them, `[B, H, N, ...]` each."""
        base = self.bases.get(layer)
        if base is None:
            super().write(layer, rows, changes)
            return
        places, held = base.places()
        part = neighbours(rows)
        places, held = places[part], held[part]
        for name, tensor in changes.items():
            base.arenas[name].flatten(0, 1)[places[held]] = tensor[:, :, : base.most][held]
        super().write(layer, rows, {name: tensor[:, :, base.most :] for name, tensor in changes.items()})

    def part_rotations(self) -> None:
        """As for the arena, and in the bases, whose entries are where they were."""
        super().part_rotations()
        for base in self.bases.values():
            base.arenas.setdefault("rope_positions", base.arenas["positions"].clone())

    def keep(self, rows: Rows, kept: Mapping[int, KeepIndices], counts: Mapping[int, Tensor] | None = None) -> Kept:
        """Make what is kept the new bases, and empty the tails; see `Store.keep`.

        Bases hold all rows, so `rows` must be the whole batch; `repack` leaves rows as they are. The lengths are read
        off what was kept, whatever the caller believes: heads differ.
        """
        if len(rows) != self.batch:
            raise CacheStateError(
                f"{len(rows)} of {self.batch} rows are to be compacted, but a ragged base is packed for the whole "
                "batch; give all rows, or repack() with those that are due."
            )
        read = counted(kept, counts)
        for layer, each in kept.items():
            self.repack(layer, rows, [Repacked(slice(None), each, read[layer], {})])
        self.resize(0, 0)
        heads = len(self.bases) * self.layout.heads
        totals = [sum(sum(base.known[b]) for base in self.bases.values()) for b in range(self.batch)]
        return Kept(tuple(-(-total // heads) for total in totals))

    def repack(self, layer: int, rows: Rows, decided: Sequence[Repacked]) -> None:
        """Make what is kept of a layer its base; the tail is the caller's to empty.

        Args:
            layer: index of the layer.
            rows: the whole batch; its lengths are slots in use of each row's tail.
            decided: what some of the rows keep; the others keep everything.
        """
        slots, base = self.read(layer, rows), self.bases.get(layer)
        kept, arenas = slots.valid.clone(), slots.arenas()
        older = [[0] * self.layout.heads] * self.batch if base is None else base.known
        known = [[count + tail for count in row] for row, tail in zip(older, rows.lengths, strict=True)]
        for part, indices, counts, changes in decided:
            kept[part], known[part] = indices.mask(kept.shape[2]), counts.tolist()
            for name, tensor in changes.items():
                arenas[name] = arenas[name].clone()
                arenas[name][part, :, : tensor.shape[2]] = tensor  # shorter where longer rows are not among them
        self.bases[layer] = Base.of(SlotTensors.of(arenas, slots.valid), kept, known)

    def rows(self, index: Tensor) -> None:
        """Reorder, repeat or select batch rows; `index` int64 `[B']` on any device."""
        super().rows(index)
        here = index.to(self.layout.device)
        self.bases = {layer: base.take(here) for layer, base in self.bases.items()}

    def clone(self) -> Self:
        """Return an independent copy."""
        twin = super().clone()
        twin.bases = {
            layer: replace(base, arenas={name: arena.clone() for name, arena in base.arenas.items()})
            for layer, base in self.bases.items()
        }
        return twin

    def entries(self, layer: int, lengths: Sequence[int]) -> list[int]:
        """Return the entries that each row of a layer holds, over all heads; `lengths` are those of its tail."""
        recent = super().entries(layer, lengths)
        base = self.bases.get(layer)
        older = [0] * len(recent) if base is None else [sum(row) for row in base.known]
        return [a + b for a, b in zip(recent, older, strict=True)]

    def bytes_allocated(self, layer: int) -> tuple[int, int]:
        """Return the bytes of the layer's keys and values, and those of its metadata."""
        data, metadata = super().bytes_allocated(layer)
        base = self.bases.get(layer)
        if base is None:
            return data, metadata
        sizes = {name: arena.numel() * arena.element_size() for name, arena in base.arenas.items()}
        index = (base.owner.numel() + base.filled.numel() + base.counts.numel()) * 8
        pairs = sizes.pop("keys") + sizes.pop("values")
        return data + pairs, metadata + sum(sizes.values()) + index
