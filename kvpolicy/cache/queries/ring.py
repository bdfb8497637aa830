"""The newest queries of requests that come and go, in rings: one scattered write per layer and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.cache.queries.log import Window
from kvpolicy.cache.store.packed import Packed
from kvpolicy.cache.store.protocol import RowId
from kvpolicy.errors import CacheStateError

_ROWS = 4  # places that a ring begins with; it doubles


@dataclass
class _Ring:
    """One row's ring.

    Attributes:
        place: which of the rings is the row's.
        first: position of its first recorded query; those of a shared prefix were never seen.
        seen: position behind its newest query.
        newest: the highest that `seen` has been; what was written for positions from `seen` on is void.
        fed: position behind the newest query that accumulating scorers have been fed.
    """

    place: int
    first: int
    seen: int
    fed: int
    newest: int


@dataclass(frozen=True)
class _Write:
    """Which tokens of a step are kept, and where: int64 `[M]` each; `take` is None when it is all of them."""

    take: Tensor | None
    to: Tensor


class QueryRing:
    """The last `size` queries of every row and layer, `[rows, size, Hq, D]` per layer; query `p` lies at `p % size`.

    Args:
        observe: queries that a compaction looks at.
        waiting: queries that may wait before accumulating scorers are fed; 0 when there is no such scorer.
        rollback: tokens that may be taken back at any time (the widest step of candidates).
    """

    def __init__(self, observe: int, *, waiting: int = 0, rollback: int = 0) -> None:
        self.observe, self.feeds = observe, waiting > 0
        self.rollback = rollback
        self.size = max(observe, waiting) + rollback
        self._rings: dict[RowId, _Ring] = {}
        self._free: list[int] = []
        self._rows = 0
        self._pages: dict[int, Tensor] = {}
        self._write: _Write | None = None

    @property
    def active(self) -> bool:
        """Whether queries must be recorded at all."""
        return self.observe > 0 or self.feeds

    def enter(self, row: RowId, seen: int = 0) -> None:
        """Begin a row whose first `seen` tokens are in the cache already, their queries unknown."""
        if not self._free:
            more = max(self._rows, _ROWS)
            self._free = list(range(self._rows + more - 1, self._rows - 1, -1))
            self._rows += more
            for layer, old in self._pages.items():
                self._pages[layer] = torch.cat([old, old.new_zeros(more * self.size, *old.shape[1:])])
        self._rings[row] = _Ring(self._free.pop(), seen, seen, seen, seen)

    def drop(self, row: RowId) -> None:
        """Forget a row."""
        self._free.append(self._rings.pop(row).place)

    def waiting(self, row: RowId) -> int:
        """Return how many of a row's queries have not been fed."""
        ring = self._rings[row]
        return ring.seen - ring.fed if self.feeds else 0

    def early(self, tokens: int) -> int:
        """Return how many of a row's next tokens do not fit into its ring: they must be fed as they come, or never."""
        return max(tokens - self.size, 0)

    def left(self, row: RowId) -> int:
        """Return how many of a row's newest queries are at hand."""
        ring = self._rings[row]
        return min(ring.seen - ring.first, self.size - (ring.newest - ring.seen))

    def open(self, packed: Packed) -> None:
        """Begin a step: work out which of its queries are kept and where, with one small copy to the device."""
        device, size, counts = packed.row.device, self.size, packed.counts()
        held = [min(count, size) for count in counts]
        rings = [self._rings[row] for row in packed.rows]
        table = torch.tensor([[r.place for r in rings], held, packed.starts[1:]], dtype=torch.int64, device=device)
        place, many, end = table.unbind(0)
        if held == counts:
            take, row = None, packed.row
        else:
            row = torch.repeat_interleave(torch.arange(len(held), device=device), many, output_size=sum(held))
            # The last `many` tokens of each row: counted from the row's end.
            take = end[row] - many[row] + torch.arange(sum(held), device=device) - (many.cumsum(0) - many)[row]
        positions = packed.positions if take is None else packed.positions[take]
        self._write = _Write(take, place[row] * size + positions % size)
        for ring, count, before in zip(rings, counts, packed.before, strict=True):
            if ring.seen != before:
                raise CacheStateError(
                    f"a row has {before} tokens, but queries of {ring.seen} were recorded; record every step once."
                )
            ring.seen += count
            ring.newest = max(ring.newest, ring.seen)

    def put(self, layer: int, queries: Tensor) -> None:
        """Keep one layer's queries `[T, Hq, D]` of the open step."""
        write = self._write
        assert write is not None
        if layer not in self._pages:
            self._pages[layer] = queries.new_zeros(self._rows * self.size, *queries.shape[1:])
        self._pages[layer].index_copy_(0, write.to, queries if write.take is None else queries[write.take])

    def fed(self, row: RowId, until: int) -> None:
        """Note that a row's queries before position `until` have been fed."""
        self._rings[row].fed = until

    def window(self, rows: Sequence[RowId], widths: Sequence[int] | None = None) -> Window | None:
        """Return where the last queries of some rows lie, in order of position; None if there are none.

        Args:
            rows: their names.
            widths: how many of each; `observe` by default, or as many as there are.
        """
        wanted = [min(self.observe, self.left(row)) for row in rows] if widths is None else list(widths)
        width = max(wanted, default=0)
        if not width or not self._pages:
            return None
        device = next(iter(self._pages.values())).device
        rings = [self._rings[row] for row in rows]
        table = torch.tensor([[r.place for r in rings], [r.seen for r in rings], wanted], device=device)
        place, seen, many = table[:, :, None].unbind(0)
        back = torch.arange(width, 0, -1, device=device)
        positions = (seen - back).clamp(min=0)
        return Window(positions.to(torch.int32), back <= many, place * self.size + positions % self.size)

    def gather(self, layer: int, window: Window) -> Tensor:
        """Return the queries `[R, Hq, Q, D]` that `window` describes."""
        assert window.index is not None
        return self._pages[layer][window.index].transpose(1, 2)

    def retract(self, row: RowId, tokens: int) -> None:
        """Forget the newest queries of a row.

        Raises:
            CacheStateError: accumulating scorers have been fed some of them and cannot forget them.
        """
        ring = self._rings[row]
        if self.feeds and tokens > ring.seen - ring.fed:
            raise CacheStateError(
                f"row {row!r}: {tokens} tokens are to be taken back, but all but {ring.seen - ring.fed} have been "
                "observed by a component that accumulates attention; take back fewer."
            )
        if ring.newest - ring.seen + tokens > self.rollback:
            raise CacheStateError(
                f"row {row!r}: {tokens} tokens are to be taken back, but queries are kept for "
                f"{self.rollback - (ring.newest - ring.seen)} of them only; make the cache with a larger `rollback`."
            )
        ring.seen -= tokens

    def bytes_allocated(self) -> int:
        """Return the bytes of all rings."""
        return sum(pages.numel() * pages.element_size() for pages in self._pages.values())


def waiting_of(ring: QueryRing, rows: Mapping[RowId, int]) -> dict[RowId, int]:
    """Return the rows that must be fed before so many more tokens come, and how many queries of each wait."""
    waiting = {row: ring.waiting(row) for row in rows}
    return {row: count for row, count in waiting.items() if count and count + rows[row] > ring.size}
