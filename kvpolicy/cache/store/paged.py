"""Paged store: entries live in blocks that an engine's scheduler hands out, and a compaction gives blocks back.

A row's token at position `p` is stored in the block `p // block` of the row's table, and stays there until the first
compaction. A compaction of a row that has seen `n` tokens moves what each head keeps, in order, into the slots
`n - kept ... n - 1`, and drops the blocks before them: *compact to the tail, drop the head*, as a sliding window does.
So the place of the next token, the positions, and lists of blocks that only grow stay what they are in an engine that
knows nothing of eviction; all that attention must know is where a row's entries begin. Each head may keep other tokens
than its neighbour, but the same number. What stood where is written on side pages: positions, and slot state.

A row may begin in the middle of its first block. Where attention can only begin with a block (`whole_blocks`), what is
kept moves on to the start of that block, and from then on the row's tokens are stored as many slots before their
positions (`BlockTable.shift`, less than a block).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpolicy.cache.blocks import BlockTables
from kvpolicy.cache.store.packed import Packed
from kvpolicy.cache.store.protocol import Kept, Layout, RowId, Rows, SlotTensors, counted, equal_lengths
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.types import KeepIndices


@dataclass
class _Places:
    """Where the slots of some rows are, made once for all layers: `block` and `offset` int64 `[B, N]`."""

    block: Tensor
    offset: Tensor
    column: Tensor = field(repr=False)  # int64 `[B, N]`, the slot itself, and the last one behind a row's end


class PagedStore:
    """Keys, values, positions and slot state of some layers in pages `[blocks, block, H, ...]`.

    Args:
        layout: what the layers have in common.
        keys, values: by layer, `[blocks, block, H, D]` and `[blocks, block, H, Dv]`; an engine's own tensors, of any
            strides. They are written to in place.
        whole_blocks: let rows begin with the first slot of a block.

    Raises:
        UnsupportedError: the layout re-rotates keys: a new token is rotated to its own position by the engine.
    """

    def __init__(
        self,
        layout: Layout,
        keys: Mapping[int, Tensor],
        values: Mapping[int, Tensor],
        *,
        whole_blocks: bool = False,
    ) -> None:
        if layout.re_rotates:
            raise UnsupportedError(
                "a paged store cannot hold re-rotated keys (trait re_rotates): the engine rotates each new key to the "
                "position that its own tables say; remove the post-operation."
            )
        self._layout = layout
        self._keys, self._values = dict(keys), dict(values)
        self._index = {layer: i for i, layer in enumerate(layout.layers)}
        self.whole_blocks = whole_blocks
        blocks, self.block = self._keys[layout.layers[0]].shape[:2]
        for layer in layout.layers:
            for tensor, dim in ((self._keys[layer], layout.key_dim), (self._values[layer], layout.value_dim)):
                if tensor.shape != (blocks, self.block, layout.heads, dim):
                    raise CacheStateError(
                        f"layer {layer}: pages of shape {list(tensor.shape)} were given instead of "
                        f"{[blocks, self.block, layout.heads, dim]}; give [blocks, block, H, D]."
                    )
        side = (len(layout.layers), blocks, self.block, layout.heads)
        self.positions = torch.zeros(side, dtype=torch.int32, device=layout.device)
        self.state = {s.name: torch.zeros(side, dtype=s.dtype, device=layout.device) for s in layout.states}
        self.tables = BlockTables(blocks, self.block)
        self._known: tuple[Rows, int, _Places] | None = None  # of these rows, at this version of the tables

    @staticmethod
    def allocate(layout: Layout, blocks: int, block: int, *, whole_blocks: bool = False) -> PagedStore:
        """Make one with pages of its own."""

        def pages(dim: int) -> dict[int, Tensor]:
            shape = (blocks, block, layout.heads, dim)
            return {i: torch.zeros(shape, dtype=layout.dtype, device=layout.device) for i in layout.layers}

        return PagedStore(layout, pages(layout.key_dim), pages(layout.value_dim), whole_blocks=whole_blocks)

    @property
    def layout(self) -> Layout:
        """What its layers have in common."""
        return self._layout

    # -- rows and their blocks ----------------------------------------------------------------------------------------

    def bind(self, row: RowId, blocks: Sequence[int], length: int = 0) -> None:
        """Begin a row.

        Args:
            row: its name.
            blocks: its first blocks; free ones, but for those that hold the `length` tokens.
            length: tokens that are there already, because another row begins with the same ones (a shared prefix).

        Raises:
            CacheStateError: the row is known, a block is another row's, or the blocks do not hold these tokens at
                these positions (which is read from the device when `length` is not 0).
        """
        self.tables.bind(row, blocks, length)
        if not length:
            return
        # A block whose row has been compacted since holds other tokens than its engine may believe.
        at = torch.arange(length, device=self.layout.device)
        table = torch.tensor(list(blocks), device=self.layout.device)
        there = self.positions[:, table[at // self.block], at % self.block]
        if not bool((there == at[:, None]).all()):
            self.tables.release(row)
            raise CacheStateError(
                f"row {row!r}: the blocks {str(list(blocks))[:60]} do not hold its first {length} tokens any more; "
                "take blocks of rows that have been compacted out of the prefix cache."
            )

    def extend(self, row: RowId, blocks: Sequence[int]) -> None:
        """Give a row more blocks, behind those that it has; raises CacheStateError if one of them is in use."""
        self.tables.extend(row, blocks)

    def release(self, row: RowId) -> tuple[int, ...]:
        """Forget a row that has finished or been preempted; return the blocks that nobody reads any more."""
        return self.tables.release(row)

    def retract(self, row: RowId, tokens: int) -> None:
        """Take back the newest tokens of a row, back to its last compaction; its blocks stay bound."""
        self.tables.retract(row, tokens)

    def copy(self, row: RowId, block: int, to: int) -> None:
        """Give a row a copy of a block that others read too, in the free block `to`, so that it may be written."""
        self.tables.swap(row, block, to)
        for pages in (*self._keys.values(), *self._values.values()):
            pages[to] = pages[block]
        for side in (self.positions, *self.state.values()):
            side[:, to] = side[:, block]

    # -- new tokens ---------------------------------------------------------------------------------------------------

    def open(self, step: Mapping[RowId, int]) -> Packed:
        """Make place for the next tokens of some rows: write their positions and fresh slot state, of all layers.

        Args:
            step: new tokens by row, in the order in which they come; rows with 0 are left out.

        Raises:
            CacheStateError: a row has no block for a token, or the block is read by another row too.
        """
        new = {row: count for row, count in step.items() if count}
        blocks = [self.tables.writable(row, count) for row, count in new.items()]
        slots = [self.tables[row].end for row in new]
        before = [slot + self.tables[row].shift for row, slot in zip(new, slots, strict=True)]
        packed = Packed.plan(tuple(new), tuple(new.values()), before, slots, blocks, self.block, self.layout.device)
        self.positions[:, packed.block, packed.offset] = packed.positions[:, None]
        for state in self.layout.states:
            self.state[state.name][:, packed.block, packed.offset] = state.fill
        for row, count in new.items():
            self.tables.advance(row, count)
        return packed

    def append(self, layer: int, keys: Tensor, values: Tensor, packed: Packed) -> None:
        """Store one layer's new keys `[T, H, D]` and values `[T, H, Dv]`, where the engine has not done so itself."""
        self._keys[layer][packed.block, packed.offset] = keys
        self._values[layer][packed.block, packed.offset] = values

    # -- the protocol -------------------------------------------------------------------------------------------------

    def read(self, layer: int, rows: Rows) -> SlotTensors:
        """Return all entries of a layer in order, gathered: copies `[B, H, N, ...]`; see `Store.read`."""
        return self.read_layers([layer], rows)[0]

    def read_layers(self, layers: Sequence[int], rows: Rows) -> list[SlotTensors]:
        """Return all entries of some layers, copies that lie at equal distances, so that they can be scored as one."""
        places, pages = self._places(rows), [self._pages(layer) for layer in layers]
        gathered = {
            name: torch.stack([each[name][places.block, places.offset].transpose(1, 2) for each in pages])
            for name in pages[0]
        }
        valid = rows.used(self.layout.device)[:, None].expand(-1, self.layout.heads, -1)
        return [SlotTensors.of({name: t[i] for name, t in gathered.items()}, valid) for i in range(len(layers))]

    def write(self, layer: int, rows: Rows, changes: Mapping[str, Tensor]) -> None:
        """Replace pages of a layer by name, slots as `read` gives them; see `Store.write`.

        Raises:
            CacheStateError: one of the blocks is read by another row too.
        """
        if not changes:
            return
        places, pages = self._places(rows), self._pages(layer)
        for row in rows.ids:
            self.tables.check_alone(row, self.tables[row].first)
        for name, tensor in changes.items():
            # Behind a shorter row's end the last entry is written again, with what it is anyway.
            index = places.column[:, None].expand(-1, self.layout.heads, -1)
            index = index[(...,) + (None,) * (tensor.dim() - 3)].expand(*index.shape, *tensor.shape[3:])
            pages[name][places.block, places.offset] = tensor.gather(2, index).transpose(1, 2).to(pages[name].dtype)

    def keep(self, rows: Rows, kept: Mapping[int, KeepIndices], counts: Mapping[int, Tensor] | None = None) -> Kept:
        """Move what is kept to the tail of each row, and drop the blocks before it; see `Store.keep`.

        Raises:
            UnsupportedError: heads or layers keep different numbers.
            CacheStateError: a block that must be written is read by another row too; `copy` it first.
        """
        lengths = equal_lengths(rows, counted(kept, counts))
        places = self._places(rows)
        firsts = [
            self.tables.tail(row, count, whole=self.whole_blocks) for row, count in zip(rows.ids, lengths, strict=True)
        ]
        spans = []
        for row, first, count in zip(rows.ids, firsts, lengths, strict=True):
            span = min(first, self.tables[row].end - 1), max(first + count, self.tables[row].end)
            self.tables.check_alone(row, *span)
            spans.append((span[0], self.tables[row].between(*span)))
        room = torch.tensor([max(count, 1) for count in lengths], device=self.layout.device)[:, None]
        targets = self._located(spans, room, max(*lengths, 1))
        head = torch.arange(self.layout.heads, device=self.layout.device)[:, None]
        for layer, (indices, many) in kept.items():
            held = many[:, :1, None].to(torch.int64)  # the same for all heads, as was checked
            columns = torch.arange(indices.shape[-1], device=indices.device)
            # Past a row's own count, its last entry again.
            columns = torch.minimum(columns, held - 1).clamp(min=0).expand(indices.shape)
            pairs = ((places, indices.gather(2, columns)), (targets, columns))
            at, to = (self._at(some, slots.flatten(1), slots.shape) for some, slots in pairs)
            for pages in self._pages(layer).values():
                pages[*to, head] = pages[*at, head]
        freed = {
            row: self.tables.drop_head(row, first, count)
            for row, first, count in zip(rows.ids, firsts, lengths, strict=True)
        }
        return Kept(lengths, {row: blocks for row, blocks in freed.items() if blocks})

    # -- inside -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _at(places: _Places, slots: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return block and offset of slots `[B, ...]` of each row."""
        return places.block.gather(1, slots).view(shape), places.offset.gather(1, slots).view(shape)

    def _pages(self, layer: int) -> dict[str, Tensor]:
        """Return everything that moves with a slot, `[blocks, block, H, ...]`, by the names of `SlotTensors.arenas`."""
        i = self._index[layer]
        pages = {"keys": self._keys[layer], "values": self._values[layer], "positions": self.positions[i]}
        return pages | {f"state.{name}": tensor[i] for name, tensor in self.state.items()}

    def _places(self, rows: Rows) -> _Places:
        """Return where the entries of some rows are; one small copy to the device while nothing changes.

        Raises:
            CacheStateError: a row is unknown or empty, or holds another number of entries than `rows` say: what counts
                and what stores have come apart.
        """
        if self._known is not None:
            known, version, places = self._known
            if version == self.tables.version and (known.ids, known.lengths) == (rows.ids, rows.lengths):
                return places
        tables = [self.tables.agreed(row, length) for row, length in zip(rows.ids, rows.lengths, strict=True)]
        lengths = rows.on(self.layout.device)["lengths"][:, None]
        places = self._located([(each.first, each.live) for each in tables], lengths, rows.longest)
        self._known = rows, self.tables.version, places
        return places

    def _located(self, spans: Sequence[tuple[int, Sequence[int]]], lengths: Tensor, longest: int) -> _Places:
        """Return where slots of rows are, of which the first one and its and the following blocks are given.

        Args:
            spans: first slot of each row, and the row's blocks from there on.
            lengths: int64 `[B, 1]`, how many slots of each; behind them the last one is repeated.
            longest: the largest of them.
        """
        width = max(len(blocks) for _, blocks in spans)
        made = torch.tensor(
            [[first % self.block, *blocks, *[0] * (width - len(blocks))] for first, blocks in spans],
            device=lengths.device,
        )
        column = torch.minimum(torch.arange(longest, device=lengths.device), lengths - 1)
        slot = column + made[:, :1]
        return _Places(made.gather(1, 1 + slot // self.block), slot % self.block, column)
