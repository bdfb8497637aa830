"""Decode steps over tensors that stay where they are, so that a model's step can be one graph.

The engine opens such a step on the host as any other: it counts, compacts what is due, writes positions and slot state,
and then tells the device, in one table of integers, where the step's tokens go. All that layers do with it are
operations on tensors whose addresses and shapes do not change: write at the rows' lengths, see what lies before them,
keep the query in a ring. Nothing of it is read back, for the ledger knows the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy import ops
from kvpolicy.cache.engine import UNOBSERVED_MOST, Engine
from kvpolicy.cache.ledger import Kind
from kvpolicy.cache.queries.log import SLACK, STEPS_BACK, RingQueries
from kvpolicy.cache.store import ArenaStore
from kvpolicy.contracts.view import Rope

_RING_BEYOND = STEPS_BACK + SLACK + 1  # records that the log keeps beyond those that it looks at, at most
_RING_UNFED = UNOBSERVED_MOST + 1  # likewise, those that wait for scorers which accumulate


class Turn:
    """Whether a step has been opened on the host and not been run yet.

    Traced code checks it and clears it. A graph that was traced keeps doing both, so that it cannot run a step that
    nobody has opened.
    """

    ready = False


@dataclass(eq=False)
class LayerStep:
    """What one layer reads and writes in a step; every tensor keeps its address while rows and slots stay.

    Attributes:
        keys, values: `[B, H, C, D]` and `[B, H, C, Dv]`, all slots of the layer.
        table: int64 `[B + 2]`: where each row's token goes, columns before the step, and the number of the query.
        slots: int64 `[C]`, `0 ... C-1`.
        batch: int64 `[B]`, `0 ... B-1`.
        ring: `[B, Hq, R, D]`, the last queries; None where nobody looks at them.
        shift: int64 `[B]`, how far keys and queries are turned back; None unless the policy re-rotates.
        rope: the layer's rotary embedding, where it is needed.
        turn: shared by all layers.
        last: whether the layer is the last that comes by.
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    slots: Tensor
    batch: Tensor
    ring: Tensor | None
    shift: Tensor | None
    rope: Rope | None
    turn: Turn
    last: bool

    @property
    def columns(self) -> Tensor:
        """Columns seen before the step, int64 `[]`."""
        return self.table[-2]

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Store the keys `[B, H, 1, D]` and values of the step's tokens."""
        row, slot = self.batch, self.table[:-2]
        self.keys[row, :, slot] = self.turned(keys)[:, :, 0]
        self.values[row, :, slot] = values[:, :, 0]

    def turned(self, vectors: Tensor) -> Tensor:
        """Rotate keys or queries `[B, heads, 1, D]` to the positions that the cached keys are rotated to."""
        if self.shift is None or self.rope is None:
            return vectors
        return ops.rotate(vectors, self.rope, -self.shift[:, None, None])

    def visible(self) -> Tensor:
        """Return the slots that each row's token attends to, bool `[B, 1, 1, C]`."""
        return (self.slots <= self.table[:-2, None])[:, None, None]

    def record(self, queries: Tensor) -> None:
        """Keep the queries `[B, Hq, 1, D]`, as the model made them."""
        if self.ring is not None:
            self.ring.index_copy_(2, self.table[-1:] % self.ring.shape[2], queries.to(self.ring.dtype))


class GraphEngine(Engine):
    """An engine whose steps of one token per row can run as one graph.

    Args:
        slots: slots of the arena; more are made only for a prompt that needs them, or an unbounded row.
        *args, **kwargs: as for `Engine`; the policy's length is counted.
    """

    def __init__(self, *args: Any, slots: int, **kwargs: Any) -> None:
        self._slots = slots
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        """Forget everything; the next forward pass starts a new sequence."""
        super().reset()
        self.stores.slots = self._slots
        self.turn = Turn()
        self._stepping = False
        self._number = 0  # of the step's query
        self.forget_tensors()

    def forget_tensors(self) -> None:
        """Make new tensors for the next step."""
        self.steps: dict[int, LayerStep] = {}
        self._rings: dict[int, Tensor] = {}
        self._tables: dict[torch.device, Tensor] = {}
        self._shifts_of: dict[torch.device, Tensor] = {}
        self._told: list[int] = []
        self._told_shifts: list[int] = []

    @property
    def columns(self) -> int:
        """Columns seen, padding included; a step that has been opened is seen when it has run."""
        return self._columns.total - self.turn.ready

    def open_step(self, batch: int, kind: Kind) -> None:
        """Begin a step of one token per row: as `open`, and tell the device.

        Args:
            batch: rows of the pass.
            kind: what the tokens are.

        Raises:
            CacheStateError, BudgetError, ScoreError: as `open`.
        """
        self._stepping = True
        try:
            forward = self.open(batch, 1, None, self.stores[self.layers[0]].layout.device, kind=kind)
        finally:
            self._stepping = False
        forward.pending = set()  # layers of a graph do not come by one by one
        self._number += 1
        self._bind(batch)
        self._tell()
        self.turn.ready = True

    def give_up_step(self) -> None:
        """Take back a step that has been opened and not been run."""
        self.turn.ready = False
        self.crop(1)

    def _make_room(self, store: ArenaStore, used: int) -> None:
        if not self._stepping:
            super()._make_room(store, used)
            return
        assert self.forward is not None
        plan = self.forward.plan_on(store.layout.device)
        self.stores.reserve(store, plan.end, used, decoding=True)
        store.mark_slots(plan)

    def _bind(self, batch: int) -> None:
        """Look up the tensors of all layers, where they are others than at the last step."""
        if self.log.active:
            self._record()
        bound = self.steps.get(self.layers[0])
        if bound is not None and all(
            self.steps[store.layers[0]].keys.data_ptr() == store.keys.data_ptr()
            and self.steps[store.layers[0]].keys.shape == store.keys.shape[1:]
            for store in self.stores.distinct()
        ):
            return
        if bound is None or bound.batch.numel() != batch:
            self._tables, self._shifts_of, self._told, self._told_shifts = {}, {}, [], []
        self.steps = {}
        for store in self.stores.distinct():
            device, capacity = store.layout.device, store.capacity
            table = self._tables.setdefault(device, torch.zeros(batch + 2, dtype=torch.int64, device=device))
            shift = None
            if self._re_rotates:
                shift = self._shifts_of.setdefault(device, torch.zeros(batch, dtype=torch.int64, device=device))
            places, rows = torch.arange(capacity, device=device), torch.arange(batch, device=device)
            for layer in store.layers:
                i = store.index[layer]
                self.steps[layer] = LayerStep(
                    store.keys[i], store.values[i], table, places, rows, self._rings.get(layer), shift,
                    self.ropes.get(layer), self.turn, layer == self.layers[-1],
                )  # fmt: skip
        for tensor in self._fixed():
            if tensor.device.type != "cpu":
                # As transformers does for its static caches: CUDA graphs need not copy what never moves.
                torch._dynamo.mark_static_address(tensor)  # noqa: SLF001  the only name it has

    def _fixed(self) -> Iterator[Tensor]:
        yield from self._tables.values()
        yield from self._shifts_of.values()
        for step in self.steps.values():
            yield from (step.keys, step.values)
            yield from () if step.ring is None else (step.ring,)

    def _record(self) -> None:
        """Let the record of the step refer to the place in the rings where its queries will be."""
        records = self.log.records
        if not self._rings or next(iter(self._rings.values())).shape[0] != len(self._used):
            self._rings = self._new_rings()
            self.steps = {}
        size = next(iter(self._rings.values())).shape[2]
        for record in records:
            if isinstance(record.queries, RingQueries):
                # Rows that hid tokens keep records longer than the ring is.
                if record.queries.number > self._number - size:
                    break
                record.queries = record.queries.copy()
        records[-1].queries = RingQueries(self._rings, self._number)

    def _new_rings(self) -> dict[int, Tensor]:
        size = self.log.observe + _RING_BEYOND + (_RING_UNFED if self.observation.active else 0)
        rings = {}
        for layer in self.layers:
            layout = self.stores[layer].layout
            shape = len(self._used), layout.heads * self.facts[layer].groups, size, layout.key_dim
            rings[layer] = torch.zeros(shape, dtype=layout.dtype, device=layout.device)
        return rings

    def _tell(self) -> None:
        """Write the step's numbers to the device; one launch where every one is by one higher than before."""
        numbers = [used - 1 for used in self._used] + [self._columns.total - 1, self._number]
        if self._told and all(new == old + 1 for new, old in zip(numbers, self._told, strict=True)):
            for table in self._tables.values():
                table.add_(1)
        else:
            host = torch.tensor(numbers)
            for table in self._tables.values():
                table.copy_(host)
        self._told = numbers
        shifts = [row.shift for row in self.rows]
        if self._re_rotates and shifts != self._told_shifts:
            for shift in self._shifts_of.values():
                shift.copy_(torch.tensor(shifts))
            self._told_shifts = shifts

    def clone(self) -> GraphEngine:
        """Return an independent copy."""
        twin: Any = super().clone()
        twin.turn = Turn()
        twin.forget_tensors()
        return twin  # type: ignore[no-any-return]
