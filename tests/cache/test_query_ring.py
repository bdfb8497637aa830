"""Rings of queries against a plain list per row: random steps, rows that come and go, tokens that are taken back."""

from __future__ import annotations

from random import Random

import pytest
import torch

from kvpolicy.cache.queries.ring import QueryRing
from kvpolicy.cache.store.packed import Packed
from kvpolicy.errors import CacheStateError

HEADS, DIM, LAYERS = 4, 3, (0, 3)


def step(ring: QueryRing, queries: dict[str, list[torch.Tensor]], counts: dict[str, int]) -> None:
    """Add random queries, by one `put` per layer, and to the lists that they are compared with."""
    before = [len(queries[row]) for row in counts]
    blocks = [[0] * (count + 1) for count in counts.values()]
    packed = Packed.plan(list(counts), list(counts.values()), before, before, blocks, 1, torch.device("cpu"))
    ring.open(packed)
    made = torch.randn(packed.tokens, HEADS, DIM)
    for layer in LAYERS:
        ring.put(layer, made + layer)
    for row, start, count in zip(packed.rows, packed.starts, packed.counts(), strict=False):
        queries[row] += made[start : start + count].unbind(0)


def check(ring: QueryRing, queries: dict[str, list[torch.Tensor]], first: dict[str, int]) -> None:
    rows = [row for row in queries if ring.left(row)]
    window = ring.window(rows)
    if not rows:
        return
    assert window is not None
    for layer in LAYERS:
        found = ring.gather(layer, window)
        for i, row in enumerate(rows):
            real = window.valid[i]
            at = window.positions[i][real].tolist()
            seen = len(queries[row])
            assert at == list(range(max(first[row], seen - ring.observe), seen))
            assert torch.equal(found[i][:, real], torch.stack([queries[row][p] + layer for p in at], 1))


@pytest.mark.parametrize(("observe", "waiting", "rollback"), [(4, 0, 0), (5, 0, 3), (2, 8, 0), (4, 6, 2)])
def test_the_ring_holds_the_last_queries_of_every_row(observe, waiting, rollback):
    random, ring = Random(observe), QueryRing(observe, waiting=waiting, rollback=rollback)
    queries: dict[str, list[torch.Tensor]] = {}
    first: dict[str, int] = {}
    for number in range(200):
        if len(queries) < 9 and random.random() < 0.3:
            row, seen = f"r{number}", random.choice([0, 0, 5])
            ring.enter(row, seen)
            queries[row], first[row] = [torch.zeros(HEADS, DIM)] * seen, seen
        if queries and random.random() < 0.1:
            row = random.choice(list(queries))
            ring.drop(row)
            del queries[row], first[row]
        some = {row: random.choice([1, 1, 1, 3, 20]) for row in queries if random.random() < 0.7}
        if some:
            for row, count in some.items():
                if waiting and ring.waiting(row) + count > ring.size:
                    ring.fed(row, len(queries[row]))
            step(ring, queries, some)
            for row, count in some.items():
                if waiting and ring.early(count):
                    ring.fed(row, len(queries[row]) - ring.size)
                if rollback and count == 3 and random.random() < 0.5:
                    ring.retract(row, 2)
                    del queries[row][-2:]
        check(ring, queries, first)
        for row in queries:
            if waiting and ring.waiting(row):
                window = ring.window([row], [ring.waiting(row)])
                assert window is not None
                wanted = torch.stack(queries[row][-ring.waiting(row) :], 1)
                assert torch.equal(ring.gather(0, window)[0], wanted)
    assert ring.bytes_allocated() == len(LAYERS) * 16 * ring.size * HEADS * DIM * 4


def test_what_was_fed_or_overwritten_is_not_taken_back():
    ring = QueryRing(4, waiting=8, rollback=3)
    queries: dict[str, list[torch.Tensor]] = {"a": []}
    ring.enter("a")
    step(ring, queries, {"a": 6})
    ring.fed("a", 5)
    with pytest.raises(CacheStateError, match="all but 1 have been observed"):
        ring.retract("a", 2)
    ring = QueryRing(4, rollback=3)
    ring.enter("a")
    step(ring, {"a": []}, {"a": 6})
    ring.retract("a", 2)
    with pytest.raises(CacheStateError, match="kept for 1 of them only"):
        ring.retract("a", 2)


def test_a_step_that_was_not_recorded_is_noticed():
    ring = QueryRing(4)
    ring.enter("a")
    with pytest.raises(CacheStateError, match="queries of 0 were recorded"):
        step(ring, {"a": [torch.zeros(HEADS, DIM)]}, {"a": 1})


def test_a_step_is_written_by_one_operator_per_layer(monkeypatch):
    """Whatever the rows and tokens: nothing is done token by token."""
    ring = QueryRing(4)
    for row in ("a", "b"):
        ring.enter(row)
    calls = []
    original = torch.Tensor.index_copy_
    monkeypatch.setattr(torch.Tensor, "index_copy_", lambda *args: calls.append(1) or original(*args))
    step(ring, {"a": [], "b": []}, {"a": 30, "b": 1})
    assert len(calls) == len(LAYERS)
