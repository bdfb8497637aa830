"""A worker of a paged engine with invented tensors, beside one arena engine per request that is driven alone."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy import Policy, Rope
from kvpolicy.cache.engine import Engine
from kvpolicy.cache.ledger import Incoming
from kvpolicy.cache.paged import PagedCache
from kvpolicy.cache.picture import LayerFacts
from kvpolicy.cache.store import Layout, Rows
from kvpolicy.cache.store.paged import PagedStore
from kvsupport.scheduler import Order, Scheduler

HEADS, GROUPS, DIM, VALUE_DIM, LAYERS, MODEL_LAYERS = 2, 2, 8, 6, (0, 2), 4
ROPES = dict.fromkeys(LAYERS, Rope(torch.tensor([1.0, 0.5, 0.1, 0.02])))
FACTS = LayerFacts(
    GROUPS,
    DIM**-0.5,
    output_projection=torch.randn(HEADS, GROUPS, VALUE_DIM, 5, generator=torch.Generator().manual_seed(1)),
)


class Token(NamedTuple):
    """Keys `[L, H, n, D]`, values `[L, H, n, Dv]` and queries `[L, Hq, n, D]` of a request's tokens."""

    keys: Tensor
    values: Tensor
    queries: Tensor


@cache
def text(name: str, longest: int = 400) -> Token:
    """What the tokens of a request bring: it depends on the request, layer and position only."""
    generator = torch.Generator().manual_seed(int(name[1:]))
    shapes = ((HEADS, DIM), (HEADS, VALUE_DIM), (HEADS * GROUPS, DIM))
    return Token(*(torch.randn(len(LAYERS), heads, longest, dim, generator=generator) for heads, dim in shapes))


class RowAlone:
    """One request in an arena, with the same tokens in the same steps."""

    def __init__(self, policy: Policy, name: str) -> None:
        self.engine = Engine(policy, [LAYERS], MODEL_LAYERS, ROPES)
        self.tokens = text(name)
        self.at = 0

    def feed(self, incoming: Incoming) -> None:
        """One forward pass."""
        span = slice(self.at, self.at + incoming.tokens)
        self.engine.open(1, incoming.tokens, None, torch.device("cpu"), kind=incoming.kind)
        for i, layer in enumerate(LAYERS):
            keys, values, queries = (tensor[i][None, :, span] for tensor in self.tokens)
            self.engine.append(layer, keys, values)
            self.engine.record(layer, queries, FACTS)
        self.at += incoming.tokens

    def retract(self, tokens: int) -> None:
        """Take back the newest tokens."""
        self.engine.crop(tokens)
        self.at -= tokens

    def positions(self) -> list[list[list[int]]]:
        """Held positions by layer and head."""
        rows = self.engine.held(slice(0, 1))
        return [self.engine.stores[layer].read(layer, rows).positions[0].tolist() for layer in LAYERS]


class Worker:
    """Carries out a scheduler's orders on a paged cache, and looks at everything after each.

    Attributes:
        compared: compactions whose kept sets were compared with the request alone.
    """

    def __init__(self, policy: Policy, *, blocks: int, block: int, candidates: int = 0, whole: bool = False) -> None:
        states = policy.slot_states
        layout = Layout(LAYERS, HEADS, DIM, VALUE_DIM, torch.float32, torch.device("cpu"), states)
        self.policy = policy
        self.store = PagedStore.allocate(layout, blocks, block, whole_blocks=whole)
        for pages in (*self.store._keys.values(), *self.store._values.values()):
            pages.fill_(float("nan"))  # whoever reads what was not written sees it
        self.cache = PagedCache(policy, self.store, MODEL_LAYERS, ROPES, rollback=candidates)
        self.alone: dict[str, RowAlone] = {}
        self.compared = 0

    def carry_out(self, order: Order) -> None:
        """One step."""
        for name, tokens in order.retracted.items():
            self.cache.retract(name, tokens)
            self.alone[name].retract(tokens)
        for name in order.released:
            self.cache.release(name)
            self.alone.pop(name, None)
        for name, blocks in order.bound.items():
            if name in self.store.tables:
                self.cache.extend(name, blocks)
            else:
                self.cache.bind(name, blocks)
        if not order.step:
            return
        step = self.cache.open(order.step)
        assert {name: sorted(blocks) for name, blocks in step.freed.items()} == {
            name: sorted(blocks) for name, blocks in order.freed.items()
        }
        made = [
            Token(*(tensor[:, :, before : before + count] for tensor in text(str(name))))
            for name, before, count in zip(step.packed.rows, step.packed.before, step.packed.counts(), strict=True)
        ]
        for i, layer in enumerate(LAYERS):
            keys, values, queries = (
                torch.cat([tensor[i].transpose(0, 1) for tensor in part]) for part in zip(*made, strict=True)
            )
            self.cache.append(layer, keys, values)
            self.cache.record(layer, queries, FACTS)
        for name, resident in order.resident.items():
            assert self.cache.ledger.resident(name) == self.store.tables[name].length == resident
        self._compare(order)

    def _compare(self, order: Order) -> None:
        for name, incoming in order.step.items():
            if name not in self.alone:
                self.alone[name] = RowAlone(self.policy, name)
            self.alone[name].feed(incoming)
        for name in order.due:
            assert self.positions(name) == self.alone[name].positions(), name
            self.compared += 1

    def _read(self, name: str, layer: int):  # type: ignore[no-untyped-def]
        return self.store.read(layer, Rows.of([name], [self.store.tables[name].length]))

    def positions(self, name: str) -> list[list[list[int]]]:
        """Held positions by layer and head."""
        return [self._read(name, layer).positions[0].tolist() for layer in LAYERS]

    def check(self, scheduler: Scheduler) -> None:
        """Every entry is reachable through its row's table, is what it says, and lies in a block of its row."""
        read = Counter(block for name in self.names for block in self.store.tables[name].live)
        assert all(count == 1 for count in read.values())
        for name in self.names:
            table = self.store.tables[name]
            assert {scheduler.pool.owner[block] for block in table.live} <= {name}
            assert not set(table.live) & set(scheduler.pool.free)
            if not table.length:
                continue
            for i, layer in enumerate(LAYERS):
                held = self._read(name, layer)
                assert held.positions.shape[2] == table.length
                at = held.positions[0].long()
                assert bool((at.diff(dim=-1) > 0).all())
                assert int(at.max()) < table.end + table.shift
                head = torch.arange(HEADS)[:, None]
                if not self.policy.post:
                    assert torch.equal(held.keys[0], text(name).keys[i][head, at])
                    assert torch.equal(held.values[0], text(name).values[i][head, at])

    @property
    def names(self) -> list[str]:
        """The rows that are bound."""
        return [str(name) for name in self.store.tables]
