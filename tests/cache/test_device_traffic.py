"""How often a compaction copies something small to the device, and reads from it: not once per layer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvpolicy import PolicySpec
from kvpolicy.cache.engine import Engine
from kvpolicy.cache.ledger import Incoming
from kvpolicy.cache.paged import PagedCache
from kvpolicy.cache.picture import LayerFacts
from kvpolicy.cache.store import Layout
from kvpolicy.cache.store.paged import PagedStore
from kvsupport.reads import counting_reads

CONSTRUCTORS = ("tensor", "as_tensor", "from_numpy", "asarray", "new_tensor")
UPLOADS = ("aten::lift_fresh",)
LAYERS = (4, 12)
HEADS, GROUPS, DIM, TOKENS = 2, 2, 8, 21
FACTS = LayerFacts(GROUPS, DIM**-0.5)


class Copies(TorchFunctionMode):
    """Counts what would be copied to the device if the cache were on an accelerator.

    On a CPU nothing is copied, so the calls that would do it are counted: tensors made of Python numbers for a device
    (by `torch.tensor` and its kin), and `.to(device)` of a tensor that was made without one, or of what was computed
    from such tensors alone.

    Attributes:
        made: where each was called from, file and function.
    """

    def __init__(self) -> None:
        self.made: list[str] = []
        self._host: dict[int, torch.Tensor] = {}  # kept alive, so that no other tensor gets its id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        on_host = bool(inputs) and all(id(each) in self._host for each in inputs)
        result = func(*args, **kwargs)
        moved = name == "to" and any(isinstance(each, torch.device) for each in tree_leaves((args, kwargs)))
        if moved and on_host:
            self._note(name)
            return result.view_as(result)  # there; what it was made of is still here
        if name in CONSTRUCTORS and "device" in kwargs:
            self._note(name)
        elif name in CONSTRUCTORS or on_host or (name == "to" and "cpu" in args):
            self._host |= {id(each): each for each in tree_leaves(result) if isinstance(each, torch.Tensor)}
        return result

    def _note(self, name: str) -> None:
        code = sys._getframe(2).f_code
        self.made.append(f"{Path(code.co_filename).name}:{code.co_name}:{name}")


class Uploads(TorchDispatchMode):
    """Counts tensors made of Python numbers, whoever makes them, below the calls that `Copies` sees."""

    def __init__(self) -> None:
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += func._schema.name in UPLOADS
        return func(*args, **(kwargs or {}))


@dataclass
class Traffic:
    """What one compaction copied, and read."""

    copies: list[str]
    uploads: int
    reads: list[str]


@contextmanager
def counting() -> Iterator[Traffic]:
    found = Traffic([], 0, [])
    with counting_reads() as reads, Uploads() as uploads, Copies() as copies:
        yield found
    found.copies, found.uploads = copies.made, uploads.made
    # Plain torch looks for similar keys block by block, until the host hears that none are left.
    found.reads = [place for place in reads.places if not place.startswith("similarity.py")]


POLICIES = {
    "key norm": {},
    "rkv": {
        "importance": {"use": "window_attention", "observe": 4}, "redundancy": "key_cosine",
        "mixer": {"use": "linear", "weight": 0.1},
    },
    "accumulated": {"importance": "accumulated_attention"},
    "remembered": {"importance": {"use": "attention_memory", "base": {"use": "window_attention", "observe": 4}}},
    "ragged": {
        "importance": {"use": "window_attention", "observe": 4}, "allocator": "adaptive_heads", "trigger": {"every": 4}
    },
    "one set": {"selector": {"use": "top_k", "scope": "model"}},
}  # fmt: skip


def policy(fields: dict[str, Any]):
    base = {"policy": "test", "budget": 16, "trigger": {"every": 4}, "protect": {"sinks": 2, "recent": 4}}
    return PolicySpec(**{"importance": "key_norm", **base, **fields, "phase": "both"}).build()


def tokens(rows: int, heads: int) -> torch.Tensor:
    return torch.randn(rows, heads, TOKENS, DIM)


def in_an_arena(layers: int, fields: dict[str, Any], rows: int) -> Traffic:
    engine = Engine(policy(fields), [tuple(range(layers))], layers)
    engine.open(rows, TOKENS, None, torch.device("cpu"), kind="prompt")
    for layer in range(layers):
        engine.append(layer, tokens(rows, HEADS), tokens(rows, HEADS))
        engine.record(layer, tokens(rows, HEADS * GROUPS), FACTS)
    engine.observe()  # queries are fed once per layer and block, whether or not a compaction follows
    with counting() as traffic:
        engine.settle()
    assert [row.compactions for row in engine.rows] == [1] * rows
    return traffic


def in_pages(layers: int, fields: dict[str, Any], rows: int) -> Traffic:
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
    with counting() as traffic:
        paged.open({row: Incoming(1) for row in range(rows)})
    assert [paged.ledger.rows[row].compactions for row in range(rows)] == [1] * rows
    return traffic


RUNS = [(run, name) for run in (in_an_arena, in_pages) for name in POLICIES if (run, name) != (in_pages, "ragged")]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("run", "name"), RUNS, ids=lambda each: getattr(each, "__name__", each))
def test_a_compaction_copies_and_reads_as_often_with_many_layers_as_with_few(run, name, rows):
    fields = POLICIES[name]
    run(LAYERS[0], fields, rows)  # whatever is made only once
    few, many = (run(layers, fields, rows) for layers in LAYERS)
    assert few.copies == many.copies
    assert few.uploads == many.uploads
    assert few.reads == many.reads == ["findings.py:read"]
    assert len(many.copies) <= 8


def test_the_counter_sees_what_it_should():
    """Each of these would be copied once for every layer."""
    device = torch.device("cpu")
    host = torch.tensor([1, 2])
    with counting() as traffic:
        there = torch.arange(4, device=device)
        host = torch.tensor([1, 2])
        for _ in range(3):
            torch.tensor([1, 2], device=device)
            host.to(device).to(device)
            (host + 1).to(device)
            there.to(device)
            there.to("cpu").to(device)
    assert [each.split(":")[-1] for each in traffic.copies] == ["tensor", "to", "to", "to"] * 3
    assert traffic.uploads == 4
    assert len(traffic.reads) == 3
