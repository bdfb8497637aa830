"""Which blocks a row reads, and who else reads them: plain integers, no torch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvpolicy.errors import CacheStateError


def live_blocks(seen: int, resident: int, block: int) -> range:
    """Return which blocks of a row's table hold something, as indices into it.

    A scheduler that counts a row with a ledger knows with this which blocks a compaction gives back.

    Args:
        seen: tokens that the row has seen (`Ledger.position`).
        resident: entries that it holds (`Ledger.resident`).
        block: slots per block.
    """
    return range((seen - resident) // block, -(-seen // block))


@dataclass
class BlockTable:
    """The blocks of one row.

    Attributes:
        block: slots per block.
        blocks: block of the positions `i * block ...`; None where a compaction has dropped it.
        first: slot of the oldest entry; the row's entries are those from `first` to `end`.
        end: slot behind the newest entry, where the next token is stored.
        floor: `end` at the last compaction; tokens before it cannot be taken back.
        shift: how far slots lie behind positions: the next token's is `end + shift`. Less than a block, and 0 unless
            rows begin with whole blocks.
    """

    block: int
    blocks: list[int | None] = field(default_factory=list)
    first: int = 0
    end: int = 0
    floor: int = 0
    shift: int = 0

    @property
    def length(self) -> int:
        """Entries per head."""
        return self.end - self.first

    @property
    def live(self) -> list[int]:
        """The blocks that hold entries, the first one perhaps from the middle on."""
        return self.between(self.first, self.end)

    def between(self, first: int, end: int) -> list[int]:
        """Return the blocks of the slots from `first` to `end`."""
        found = self.blocks[first // self.block : -(-end // self.block)]
        return [block for block in found if block is not None]


class BlockTables:
    """The tables of all rows, and the number of readers of each block.

    Args:
        blocks: how many there are; they are named `0 ... blocks - 1`.
        block: slots per block.

    Attributes:
        version: changes with everything that changes here.
    """

    def __init__(self, blocks: int, block: int) -> None:
        self.blocks, self.block = blocks, block
        self.version = 0
        self._tables: dict[Hashable, BlockTable] = {}
        self._readers: dict[int, int] = {}

    def __getitem__(self, row: Hashable) -> BlockTable:
        if row not in self._tables:
            raise CacheStateError(f"row {row!r} is not bound to any blocks; bind() it first.")
        return self._tables[row]

    def __contains__(self, row: Hashable) -> bool:
        return row in self._tables

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._tables)

    @property
    def held(self) -> int:
        """How many blocks some row reads."""
        return len(self._readers)

    def readers(self, block: int) -> int:
        """Return how many rows read a block."""
        return self._readers.get(block, 0)

    def bind(self, row: Hashable, blocks: Sequence[int], length: int) -> None:
        """Begin a row, whose first `length` tokens are in its first blocks already."""
        if row in self._tables:
            raise CacheStateError(f"row {row!r} is bound already; release() it first.")
        filled = -(-length // self.block)
        if filled > len(blocks):
            raise CacheStateError(f"row {row!r}: {len(blocks)} blocks of {self.block} cannot hold {length} tokens.")
        self._take(row, blocks[:filled], shared=True)
        self._take(row, blocks[filled:], shared=False)
        self._tables[row] = BlockTable(self.block, list(blocks), 0, length, 0)
        self._read(blocks)

    def extend(self, row: Hashable, blocks: Sequence[int]) -> None:
        """Give a row more blocks."""
        table = self[row]
        self._take(row, blocks, shared=False)
        table.blocks += blocks
        self._read(blocks)

    def _take(self, row: Hashable, blocks: Sequence[int], *, shared: bool) -> None:
        for i, block in enumerate(blocks):
            if not 0 <= block < self.blocks or block in blocks[:i]:
                raise CacheStateError(
                    f"row {row!r}: block {block} comes twice, or is none of the {self.blocks} that there are."
                )
            if not shared and self.readers(block):
                raise CacheStateError(f"row {row!r}: block {block} is another row's, or its own; give a free one.")

    def _read(self, blocks: Iterable[int]) -> None:
        self.version += 1
        for block in blocks:
            self._readers[block] = self.readers(block) + 1

    def _let_go(self, blocks: Iterable[int | None]) -> tuple[int, ...]:
        """Return those of the blocks that nobody reads any more."""
        self.version += 1
        free = []
        for block in blocks:
            if block is None:
                continue
            self._readers[block] -= 1
            if not self._readers[block]:
                del self._readers[block]
                free.append(block)
        return tuple(free)

    def release(self, row: Hashable) -> tuple[int, ...]:
        """Forget a row; return the blocks that are free now."""
        table = self[row]
        del self._tables[row]
        return self._let_go(table.blocks)

    def tail(self, row: Hashable, held: int, *, whole: bool) -> int:
        """Return the slot at which a row's entries will begin when `held` are left; `whole`: the first of its block."""
        table = self[row]
        first = table.end + table.shift - held
        return first - first % self.block if whole else first

    def drop_head(self, row: Hashable, first: int, held: int) -> tuple[int, ...]:
        """Let a row's `held` entries begin at the slot that `tail` said; return the blocks that are free now."""
        table = self[row]
        gone = slice(table.first // self.block, first // self.block)
        dropped = table.blocks[gone]
        table.blocks[gone] = [None] * len(dropped)
        seen = table.end + table.shift
        table.first, table.end, table.floor = first, first + held, first + held
        table.shift = seen - table.end
        return self._let_go(dropped)

    def swap(self, row: Hashable, block: int, to: int) -> None:
        """Let a row read the free block `to` in the place of `block`."""
        table = self[row]
        if block not in table.blocks:
            raise CacheStateError(f"row {row!r} does not read block {block}.")
        self._take(row, [to], shared=False)
        table.blocks[table.blocks.index(block)] = to
        self._read([to])
        self._let_go([block])

    def writable(self, row: Hashable, tokens: int) -> list[int]:
        """Return the blocks that the next tokens of a row fall into; raises CacheStateError if they may not."""
        table = self[row]
        if table.end + tokens > len(table.blocks) * self.block:
            raise CacheStateError(
                f"row {row!r} has {len(table.blocks)} blocks of {self.block} for {table.end} tokens and {tokens} more; "
                "extend() it first."
            )
        self.check_alone(row, table.end, table.end + tokens)
        return table.between(table.end, table.end + tokens)

    def check_alone(self, row: Hashable, first: int, end: int | None = None) -> None:
        """Raise CacheStateError if a block of the slots from `first` to `end` is read by another row too."""
        for block in self.shared(row, first, end):
            raise CacheStateError(
                f"block {block} is read by {self.readers(block)} rows and cannot be written for row {row!r} alone; "
                "copy() it into a free block first."
            )

    def shared(self, row: Hashable, first: int, end: int | None = None) -> list[int]:
        """Return the blocks of the slots from `first` to `end` that another row reads too."""
        table = self[row]
        found = table.between(first, table.end if end is None else end)
        return [block for block in found if self.readers(block) > 1]

    def advance(self, row: Hashable, tokens: int) -> None:
        """Count the next tokens of a row."""
        self[row].end += tokens
        self.version += 1

    def retract(self, row: Hashable, tokens: int) -> None:
        """Take back the newest tokens of a row."""
        table = self[row]
        if table.end - tokens < table.floor:
            raise CacheStateError(
                f"row {row!r}: {tokens} tokens back lies before the last compaction, which was at token {table.floor} "
                f"of {table.end}; take back at most {table.end - table.floor}."
            )
        table.end -= tokens
        self.version += 1

    def agreed(self, row: Hashable, length: int) -> BlockTable:
        """Return the table of a row that holds `length` entries; raises CacheStateError if it holds another number."""
        table = self[row]
        if table.length != length or not length:
            raise CacheStateError(
                f"row {row!r} holds {table.length} entries, but {length} were counted; count every token and every "
                "compaction once, and read no row that is empty."
            )
        return table
