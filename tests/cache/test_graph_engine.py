"""Steps over tensors that stay where they are: what the engine tells a device, and that it never asks one."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import PolicySpec
from kvpolicy.cache.engine import Engine
from kvpolicy.cache.graph import GraphEngine
from kvpolicy.cache.picture import LayerFacts

LAYERS, HEADS, GROUPS, DIM, BOUND = (0, 1, 2), 2, 2, 8, 24
FACTS = LayerFacts(GROUPS, DIM**-0.5)


def policy(importance):
    return PolicySpec(
        policy="test", budget=16, trigger={"every": 8}, protect={"sinks": 2, "recent": 4}, importance=importance
    ).build()


def tensors(rows, heads, width, device):
    return torch.randn(rows, heads, width, DIM).to(device)


def prompt(engine, rows, width, valid=None, device="cpu"):
    engine.open(rows, width, valid, torch.device(device), kind="prompt")
    for layer in LAYERS:
        engine.append(layer, tensors(rows, HEADS, width, device), tensors(rows, HEADS, width, device))
        engine.record(layer, tensors(rows, HEADS * GROUPS, width, device), FACTS)


def step(engine, rows, device="cpu"):
    """Run a step; return which slots each row saw."""
    engine.open_step(rows, "decode")
    for layer in LAYERS:
        one = engine.steps[layer]
        one.write(tensors(rows, HEADS, 1, device), tensors(rows, HEADS, 1, device))
        seen = one.visible()
        one.record(tensors(rows, HEADS * GROUPS, 1, device))
    engine.turn.ready = False
    return seen[:, 0, 0]


IMPORTANCE = {
    "window": {"use": "window_attention", "observe": 4}, "none": "key_norm", "accumulated": "accumulated_attention",
}  # fmt: skip


@pytest.mark.parametrize("importance", IMPORTANCE.values(), ids=IMPORTANCE)
def test_no_step_asks_the_device_for_anything(importance):
    """Tensors on `meta` have no content. Rows differ in length where the prompt's padding need not be read."""
    engine = GraphEngine(policy(importance), [LAYERS], 3, slots=BOUND)
    valid = torch.ones(2, 14, dtype=torch.bool)
    valid[1, :5] = engine.log.active
    prompt(engine, 2, 14, valid, "meta")
    for _ in range(10):
        step(engine, 2, "meta")
    assert [row.resident for row in engine.rows] == [24, 24 if engine.log.active else 19]
    with pytest.raises((NotImplementedError, RuntimeError)):
        step(engine, 2, "meta")  # the compaction reads


def test_rows_see_what_they_hold():
    engine = GraphEngine(policy("key_norm"), [LAYERS], 3, slots=BOUND)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :4] = False
    prompt(engine, 2, 9, valid)
    lengths = [[10, 6]]
    for _ in range(30):
        assert step(engine, 2).sum(1).tolist() == lengths[-1]
        lengths.append([row.resident + 1 if row.resident < BOUND else 17 for row in engine.rows])
        assert engine.stores[0].capacity == BOUND


@pytest.mark.parametrize("importance", IMPORTANCE.values(), ids=IMPORTANCE)
def test_entries_and_queries_are_those_of_an_engine_without(importance):
    """The ring goes around several times, and a fork keeps the queries that its original writes over."""
    found = []
    for kind in (Engine, GraphEngine):
        torch.manual_seed(0)
        engine = kind(policy(importance), [LAYERS], 3, **({"slots": BOUND} if kind is GraphEngine else {}))
        prompt(engine, 2, 20)
        twin = None
        for number in range(200):
            if number == 150:
                twin = engine.clone()
            if kind is GraphEngine:
                step(engine, 2)
                continue
            engine.open(2, 1, None, torch.device("cpu"), kind="decode")
            for layer in LAYERS:
                engine.append(layer, tensors(2, HEADS, 1, "cpu"), tensors(2, HEADS, 1, "cpu"))
                engine.record(layer, tensors(2, HEADS * GROUPS, 1, "cpu"), FACTS)
        for each in (engine, twin):
            each.settle()
            slots = each.stores[1].read(1, each.held(slice(None)))
            window = each.log.window()
            queries = [] if window is None else [each.log.gather(2, window)]
            found.append([slots.positions, slots.keys, slots.values, *slots.state.values(), *queries])
    for plain, graph in zip(found[:2], found[2:], strict=True):
        for one, other in zip(plain, graph, strict=True):
            assert torch.equal(one, other)
