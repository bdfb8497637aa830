"""The last queries of every layer: what importance scorers observe, and what accumulated attention has yet to see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

SLACK = 8
"""Records that may be forgotten are forgotten together, once in so many steps."""
STEPS_BACK = 16
"""Single tokens that can be taken back at any time."""
ROLLBACK = 64
"""Columns of the last forward pass that can be taken back."""


class RingQueries(Mapping[int, Tensor]):
    """The queries of one step in the rings of all layers, `[B, Hq, 1, D]` by layer; views are made when asked for."""

    def __init__(self, rings: Mapping[int, Tensor], number: int) -> None:
        self._rings = rings
        self.number = number

    def __getitem__(self, layer: int) -> Tensor:
        ring = self._rings[layer]
        return ring.narrow(2, self.number % ring.shape[2], 1)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rings)

    def __len__(self) -> int:
        return len(self._rings)

    def copy(self) -> dict[int, Tensor]:
        """Return them where the ring does not overwrite them."""
        return {layer: self[layer].clone() for layer in self}


@dataclass
class Record:
    """The last `width` columns of one forward pass.

    Attributes:
        span: columns of the forward pass that are still in the cache.
        width: how many of the last of them are held, padding included.
        counts: valid queries per row among them.
        positions: int32 `[B, width]`, original positions (anything where not valid).
        valid: bool `[B, width]`.
        unobserved: how many of the last columns have not been fed to `observe_attention`.
        queries: layer -> `[B, Hq, width, D]`.
    """

    span: int
    width: int
    counts: list[int]
    positions: Tensor
    valid: Tensor
    unobserved: int
    queries: dict[int, Tensor] | RingQueries = field(default_factory=dict)

    def without(self, columns: int) -> Record:
        """Return the record without its last `columns` columns."""
        end = max(self.width - columns, 0)
        valid = self.valid[:, :end]
        return replace(
            self,
            span=self.span - columns,
            width=end,
            counts=[int(n) for n in valid.sum(1).tolist()],
            positions=self.positions[:, :end],
            valid=valid,
            unobserved=max(self.unobserved - columns, 0),
            queries={layer: q[:, :, :end] for layer, q in self.queries.items()},
        )


@dataclass(frozen=True)
class Window:
    """The last valid queries of each row.

    Attributes:
        positions: int32 `[B, Q]`.
        valid: bool `[B, Q]`.
        index: int64 `[B, Q]` into the concatenated columns, or None when the last `Q` columns are meant.
    """

    positions: Tensor
    valid: Tensor
    index: Tensor | None


class QueryLog:
    """Keeps at least the last `observe` valid queries of each row, and every query that is still unobserved.

    So many are left even when the last forward pass is taken back, `ROLLBACK` columns of it at most, or the last 16
    tokens. Decode steps are kept by reference: nothing is copied per token.
    """

    def __init__(self, observe: int, *, feeds_attention: bool) -> None:
        self.observe = observe
        self.feeds_attention = feeds_attention
        self.active = observe > 0 or feeds_attention  # whether queries must be recorded at all
        self.records: list[Record] = []

    @property
    def unobserved(self) -> int:
        """Columns that `observe_attention` has not seen."""
        return sum(r.unobserved for r in self.records)

    def open(self, positions: Tensor, valid: Tensor, counts: list[int], *, ragged: bool) -> None:
        """Start the record of a forward pass.

        Args:
            positions: int32 `[B, q]`.
            valid: bool `[B, q]`.
            counts: valid tokens per row.
            ragged: some of the tokens are padding.
        """
        columns = positions.shape[1]
        wanted = self.observe + ROLLBACK
        width = min(columns, wanted)
        if ragged:
            enough = torch.tensor([min(wanted, n) for n in counts])
            from_end = valid.to("cpu").flip(1).cumsum(1)
            reached = (from_end >= enough[:, None]).to(torch.int64).argmax(1) + 1
            width = max(width, int(reached.max()))
        if width < columns:
            positions, valid = positions[:, columns - width :], valid[:, columns - width :]
        held = [int(n) for n in valid.sum(1).tolist()] if ragged else [width] * len(counts)
        self.records.append(Record(columns, width, held, positions, valid, width if self.feeds_attention else 0))
        if len(self.records) > self.observe + STEPS_BACK + SLACK:
            self._trim()

    def put(self, layer: int, queries: Tensor) -> None:
        """Add one layer's queries `[B, Hq, q, D]` to the open record."""
        record = self.records[-1]
        columns = queries.shape[2]
        assert isinstance(record.queries, dict)
        record.queries[layer] = queries if columns == record.width else queries[:, :, columns - record.width :].clone()

    def _trim(self) -> None:
        """Forget records that neither the window nor the observation still needs."""
        # What may be taken back again does not count.
        back = max(min(self.records[-1].span, ROLLBACK), STEPS_BACK)
        later = [-back] * len(self.records[-1].counts)
        for i in range(len(self.records) - 1, -1, -1):
            if i < len(self.records) - 1 and min(later) >= self.observe and self.records[i].unobserved == 0:
                del self.records[: i + 1]
                return
            later = [a + b for a, b in zip(later, self.records[i].counts, strict=True)]

    def window(self) -> Window | None:
        """Return positions and validity of the last `observe` valid queries of each row, or None if there are none."""
        if not self.observe or not self.records:
            return None
        positions = torch.cat([r.positions for r in self.records], 1)
        valid = torch.cat([r.valid for r in self.records], 1)
        width = min(self.observe, positions.shape[1])
        if all(n == r.width for r in self.records for n in r.counts):
            return Window(positions[:, -width:], valid[:, -width:], None)
        order = torch.where(valid, torch.arange(valid.shape[1], device=valid.device), -1)
        index = order.topk(width, dim=1).indices.sort(1).values
        return Window(positions.gather(1, index), valid.gather(1, index), index)

    def gather(self, layer: int, window: Window) -> Tensor:
        """Return the queries `[B, Hq, Q, D]` that `window` describes."""
        if window.index is None:
            # Records may hold far more than the window, and these tensors live as long as a compaction.
            wanted, parts = window.positions.shape[1], []
            for record in reversed(self.records):
                parts.append(record.queries[layer][:, :, -wanted:])
                wanted -= parts[-1].shape[2]
                if wanted <= 0:
                    break
            return torch.cat(parts[::-1], 2)
        queries = torch.cat([r.queries[layer] for r in self.records], 2)
        index = window.index[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        return queries.gather(2, index)

    def left_after(self, columns: int, batch: int) -> list[int]:
        """Return how many valid queries of each row would be left without the last `columns` columns."""
        left = [0] * batch
        for r in reversed(self.records):
            kept = r.without(columns).counts if 0 < columns < r.span else r.counts if columns == 0 else [0] * batch
            columns = max(columns - r.span, 0)
            left = [a + b for a, b in zip(left, kept, strict=True)]
        return left

    def crop(self, columns: int) -> None:
        """Forget the last `columns` columns. The caller has checked that none of them has been observed."""
        while columns and self.records:
            last = self.records[-1]
            if last.span > columns:
                self.records[-1] = last.without(columns)
                return
            columns -= last.span
            self.records.pop()

    def hide(self, row: int, visible: Tensor) -> None:
        """Forget the queries of a row's hidden tokens, and number those behind them anew.

        Args:
            row: which row.
            visible: bool `[seen]` on the CPU, by position as it was: the tokens that still count.
        """
        anew = (visible.cumsum(0) - 1).to(torch.int32)
        for i, r in enumerate(self.records):
            host = r.positions[row].long().clamp(0, visible.numel() - 1).to("cpu")  # anything where not valid
            positions, valid = r.positions.clone(), r.valid.clone()
            positions[row] = anew[host].to(positions.device)
            valid[row] &= visible[host].to(valid.device)
            counts = [*r.counts[:row], int(valid[row].sum()), *r.counts[row + 1 :]]
            self.records[i] = replace(r, counts=counts, positions=positions, valid=valid)

    def rows(self, index: Tensor) -> None:
        """Reorder, repeat or select batch rows; `index` int64 `[B']`."""
        host = index.tolist()
        for i, r in enumerate(self.records):
            self.records[i] = replace(
                r,
                counts=[r.counts[b] for b in host],
                positions=r.positions.index_select(0, index.to(r.positions.device)),
                valid=r.valid.index_select(0, index.to(r.valid.device)),
                queries={layer: q.index_select(0, index.to(q.device)) for layer, q in r.queries.items()},
            )

    def clone(self) -> QueryLog:
        """Return an independent copy; tensors are shared unless somebody writes into them."""
        twin = QueryLog(self.observe, feeds_attention=self.feeds_attention)
        twin.records = [replace(r, counts=list(r.counts), queries=r.queries.copy()) for r in self.records]
        return twin
