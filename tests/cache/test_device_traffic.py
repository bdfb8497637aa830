"""How often a compaction copies something small to the device, and reads from it: not once per layer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from kvpolicy import PolicySpec
from kvpolicy.cache.engine import Engine
from kvpolicy.cache.ledger import Incoming
from kvpolicy.cache.paged import PagedCache
from kvpolicy.cache.picture import LayerFacts
from kvpolicy.cache.store import Layout
from kvpolicy.cache.store.paged import PagedStore

CONSTRUCTORS = {"torch.tensor", "torch.as_tensor", "torch.from_numpy", "torch.asarray", "torch.Tensor.new_tensor"}
READS = {
    f"torch.Tensor.{name}"
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__")
} | {"torch.equal", "torch.Tensor.equal", "torch.allclose"}
SYNCING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}
UPLOADS = {"aten::lift_fresh"}
LAYERS = (4, 12)
HEADS, GROUPS, DIM, TOKENS = 2, 2, 8, 21
FACTS = LayerFacts(GROUPS, DIM**-0.5)


def _caller(name: str) -> str:
    frame = sys._getframe(2)
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}:{name}"


class Traffic(TorchFunctionMode):
    """Counts what would cross the bus if the cache were on an accelerator.

    On a CPU nothing crosses, so the calls that would make it are counted: tensors made of Python numbers (by
    `torch.tensor` and its kin), `.to` of a tensor made that way, and whatever waits for a tensor's numbers. An `item` or
    an index by a mask that PyTorch runs below Python is seen by the dispatch mode inside.

    Attributes:
        copies, reads: where each was called from: file and function.
    """

    def __init__(self) -> None:
        self.copies: list[str] = []
        self.reads: list[str] = []
        self._host: set[int] = set()
        self._alive: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = resolve_name(func) or ""
        kwargs = kwargs or {}
        made_of_host = bool(args) and isinstance(args[0], torch.Tensor) and id(args[0]) in self._host
        if name in READS and not made_of_host:
            self.reads.append(_caller(name))
        if name == "torch.Tensor.to":
            to_cpu = any(str(each) == "cpu" for each in (*args[1:], *kwargs.values()) if isinstance(each, str))
            if to_cpu and not made_of_host:
                self.reads.append(_caller(name))
            elif made_of_host and any(isinstance(each, torch.device) for each in (*args[1:], *kwargs.values())):
                self.copies.append(_caller(name))
        if name in CONSTRUCTORS and "device" in kwargs:
            self.copies.append(_caller(name))
        result = func(*args, **kwargs)
        off_device = name in CONSTRUCTORS and "device" not in kwargs
        read_back = name == "torch.Tensor.cpu" or (name == "torch.Tensor.to" and to_cpu)
        if off_device or read_back or (made_of_host and name != "torch.Tensor.to"):
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self._host.add(id(tensor))
                    self._alive.append(tensor)  # so that no other tensor gets its id
        return result


class Below(TorchDispatchMode):
    """Counts the operators that read a tensor's numbers, whoever calls them, and what is made of Python numbers."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.uploads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_mask = name.startswith("aten::index") and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool
            for listed in args[1:] if isinstance(listed, (list, tuple)) for each in listed
        )  # fmt: skip
        if name in SYNCING or by_mask:
            self.reads.append(name)
        if name in UPLOADS:
            self.uploads.append(name)
        return func(*args, **(kwargs or {}))


POLICIES = {
    "key norm": {},
    "rkv": {
        "importance": {"use": "window_attention", "observe": 4}, "redundancy": "key_cosine",
        "mixer": {"use": "linear", "weight": 0.1},
    },
    "accumulated": {"importance": "accumulated_attention"},
    "remembered": {"importance": {"use": "attention_memory", "base": {"use": "window_attention", "observe": 4}}},
    "one set": {"selector": {"use": "top_k", "scope": "model"}},
}  # fmt: skip


def policy(fields: dict[str, Any]):
    base = {"policy": "test", "budget": 16, "trigger": {"every": 4}, "protect": {"sinks": 2, "recent": 4}}
    return PolicySpec(**{"importance": "key_norm", **base, **fields, "phase": "both"}).build()


def tokens(rows: int, heads: int) -> torch.Tensor:
    return torch.randn(rows, heads, TOKENS, DIM)


def in_an_arena(layers: int, fields: dict[str, Any], rows: int) -> tuple[Traffic, Below]:
    engine = Engine(policy(fields), [tuple(range(layers))], layers)
    engine.open(rows, TOKENS, None, torch.device("cpu"), kind="prompt")
    for layer in range(layers):
        engine.append(layer, tokens(rows, HEADS), tokens(rows, HEADS))
        engine.record(layer, tokens(rows, HEADS * GROUPS), FACTS)
    engine.observe()  # queries are fed once per layer and block, whether or not a compaction follows
    below, traffic = Below(), Traffic()
    with below, traffic:
        engine.settle()
    assert [row.compactions for row in engine.rows] == [1] * rows
    return traffic, below


def in_pages(layers: int, fields: dict[str, Any], rows: int) -> tuple[Traffic, Below]:
    chosen = policy(fields)
    layout = Layout(tuple(range(layers)), HEADS, DIM, DIM, torch.float32, torch.device("cpu"), chosen.slot_states)
    paged = PagedCache(chosen, PagedStore.allocate(layout, 8 * rows, 4), layers)
    for row in range(rows):
        paged.bind(row, list(range(8 * row, 8 * row + 8)))
    paged.open({row: Incoming(TOKENS, "prompt") for row in range(rows)})
    for layer in range(layers):
        paged.append(layer, tokens(rows, HEADS).transpose(1, 2).flatten(0, 1), torch.randn(rows * TOKENS, HEADS, DIM))
        paged.record(layer, torch.randn(rows * TOKENS, HEADS * GROUPS, DIM), FACTS)
    if paged.ring.feeds:
        paged.observe(range(rows))
    below, traffic = Below(), Traffic()
    with below, traffic:
        paged.open({row: Incoming(1) for row in range(rows)})
    assert [paged.ledger.rows[row].compactions for row in range(rows)] == [1] * rows
    return traffic, below


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("run", [in_an_arena, in_pages])
def test_copies_to_the_device_do_not_grow_with_the_layers(run, fields, rows):
    few, many = (run(layers, fields, rows) for layers in LAYERS)
    assert few[0].copies == many[0].copies
    assert few[1].uploads == many[1].uploads, "tensors made of Python numbers"


def test_the_counter_sees_what_it_should():
    """Each of these crosses the bus once for every layer."""
    below, traffic = Below(), Traffic()
    device = torch.device("cpu")
    with below, traffic:
        there = torch.arange(4, device=device)
        for _ in range(3):
            torch.tensor([1, 2], device=device)
            torch.tensor([1, 2]).to(device)
            there.tolist()
            there[there > 1]
            bool((there > 9).any())
            there.to("cpu").tolist()
    assert len(traffic.copies) == 6
    assert len(below.uploads) == 6
    assert len(traffic.reads) == 9
    assert below.reads.count("aten::_local_scalar_dense") >= 3
    assert sum(name.startswith("aten::index") for name in below.reads) == 3
