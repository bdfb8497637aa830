"""Whole policies with ``backend: triton`` keep what they keep with torch."""

from __future__ import annotations

import collections
import logging
from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy.cache.engine import Engine
from kvpolicy.cache.store import arena
from kvpolicy.contracts.view import CacheView, Rope
from kvpolicy.errors import UnsupportedError
from kvpolicy.ops import dispatch
from kvpolicy_kernels import compaction, launching, selection, similarity, window
from kvsupport.oracle_rows import TOLERANCE


def views(device, layers=3, batch=2, heads=2, group=2, n=72, dim=16):
    arena = (
        (torch.randn(layers, batch, heads, 1, dim) + torch.randn(layers, batch, heads, n + 4, dim)).half().to(device)
    )
    positions = torch.arange(n, dtype=torch.int32, device=device).expand(batch, heads, n)
    resident = torch.tensor([n, n - 7], device=device)
    valid = (torch.arange(n, device=device) < resident[:, None])[:, None].expand(-1, heads, -1)
    asked = torch.ones(batch, 8, dtype=torch.bool, device=device)
    rope = Rope(1e4 ** -torch.linspace(0, 1, dim // 2, device=device))
    for layer in range(layers):
        yield CacheView(
            keys=arena[layer, :, :, :n], values=arena[layer, :, :, :n], positions=positions, valid=valid,
            scale=dim**-0.5, rope=rope, layer_idx=layer, num_layers=layers,
            prompt_length=torch.full((batch,), 9, device=device), seen=resident,
            compaction=torch.zeros(batch, dtype=torch.int64, device=device),
            queries=torch.randn(batch, heads, group, 8, dim).half().to(device),
            query_positions=(resident[:, None] - 8 + torch.arange(8, device=device)).int(), query_valid=asked,
        )  # fmt: skip


def asked_of(backend, monkeypatch):
    """Return a list that grows by each operation that asks a backend, with what runs it: None is torch."""
    asked = []
    own = dispatch._implementation

    def noted(name, op, args, kwargs):
        chosen = own(name, op, args, kwargs)
        if name == backend:
            asked.append((op, chosen))
        return chosen

    monkeypatch.setattr(dispatch, "_implementation", noted)
    return asked


BOTH = {"window_importance", "redundancy", "top_k"}
OPERATIONS = {
    "rkv": BOTH,
    "rkv-code": BOTH,
    "rkv-paper": BOTH,
    "rkv-density": {"window_importance", "key_density", "top_k"},
    "snapkv": {"window_importance", "top_k"},
    "snapkv-prefill": {"window_importance", "top_k"},
    "g-kv": BOTH,
    "keydiff": {"mean_key_similarity", "top_k"},
    "knorm": {"top_k"},
}


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("name", OPERATIONS)
def test_same_kept_slots_as_torch_and_nothing_left_to_torch(name, device, monkeypatch):
    asked = asked_of("triton", monkeypatch)
    states = {state.name: state.fill for state in kvpolicy.load(name).build().slot_states}
    made = [
        replace(view, state={state: torch.full(view.shape, fill, device=device) for state, fill in states.items()})
        for view in views(device)
    ]
    kept, scored = {}, {}
    for backend in ("torch", "triton"):
        for view in made:
            view.memo.clear()  # the other backend's scores
        policy = kvpolicy.load(name, budget=40, backend=backend).build()
        kept[backend] = policy.select(made, [40, 40])
        scored[backend] = [policy.scores(view) for view in made]
    assert {op for op, _ in asked} == OPERATIONS[name]
    assert all(chosen.__module__.startswith("kvpolicy_kernels.") for _, chosen in asked)
    for layer, view in enumerate(made):
        a, b = kept["torch"][layer].indices, kept["triton"][layer].indices
        ours, theirs = scored["triton"][layer], scored["torch"][layer]
        torch.testing.assert_close(ours.importance, theirs.importance, atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(ours.redundancy, theirs.redundancy, atol=1e-7, rtol=1e-5)
        # A difference of two nearly equal terms has their rounding and not its own.
        torch.testing.assert_close(ours.retention, theirs.retention, atol=TOLERANCE, rtol=1e-5)
        ranked = theirs.retention.masked_fill(~view.valid, float("-inf")).sort(-1, descending=True).values
        gap = (ranked[..., :-1] - ranked[..., 1:])[..., 20:60].amin(-1)
        clear = gap > 1e-7  # equal scores but for rounding may change places
        assert torch.equal(a[clear], b[clear])


@pytest.mark.usefixtures("seed")
def test_an_engine_compacts_with_the_kernels(device, caplog):
    """The same tokens through two engines leave the same entries, bit for bit."""
    dtype, dim, results = torch.float16, 16, {}
    tokens = torch.randn(2, 2, 60, dim).to(dtype).to(device)
    asked = torch.randn(2, 4, 60, dim).to(dtype).to(device)
    for backend in ("torch", "triton"):
        spec = kvpolicy.load("rkv", budget=24, backend=backend).replace("trigger", {"every": 8})
        engine = Engine(spec.build(), [(0, 1)], 2)
        for start, count in ((0, 30), *((t, 1) for t in range(30, 60))):
            engine.open(2, count, None, device, kind="decode" if start else "prompt")
            for layer in (0, 1):
                new = tokens[:, :, start : start + count] * (layer + 1)
                engine.append(layer, new, new)
                facts = kvpolicy.cache.engine.LayerFacts(groups=2, scale=dim**-0.5)
                engine.record(layer, asked[:, :, start : start + count], facts)
        engine.settle()
        results[backend] = [engine.view(layer, slice(0, 2)) for layer in (0, 1)]
        assert engine.rows[0].compactions >= 3
    for torch_view, triton_view in zip(results["torch"], results["triton"], strict=True):
        assert torch.equal(torch_view.positions, triton_view.positions)
        assert torch.equal(torch_view.keys, triton_view.keys)
        assert torch.equal(torch_view.values, triton_view.values)


def test_all_layers_of_a_compaction_share_each_launch(device, monkeypatch):
    launches = collections.Counter()
    own = launching.launch

    def counted(name, *arguments, **options):
        launches[name] += 1
        own(name, *arguments, **options)

    for module in (window, similarity, selection, compaction):
        monkeypatch.setattr(module, "launch", counted)
    monkeypatch.setitem(arena._TOGETHER, "cpu", 1 << 20)  # as on an accelerator
    spec = kvpolicy.load("rkv", budget=24, backend="triton").replace("trigger", {"every": 8})
    engine = Engine(spec.build(), [(0, 1, 2)], 3)
    for start, count in ((0, 31), (31, 1)):
        engine.open(1, count, None, device, kind="decode" if start else "prompt")
        for layer in range(3):
            new = torch.randn(1, 2, count, 16, dtype=torch.float16, device=device)
            engine.append(layer, new, new)
            engine.record(layer, new.repeat(1, 2, 1, 1), kvpolicy.cache.engine.LayerFacts(groups=2, scale=0.25))
    engine.settle()
    assert engine.rows[0].resident == 24
    assert launches.pop("compaction.move_kept") == 3, "keys, values, positions"
    assert set(launches.values()) == {1}
    assert launches["selection.select_top"] == 1


def test_an_engine_refuses_at_the_first_token(device, monkeypatch):
    """Not at the first compaction, thousands of tokens later."""
    engine = Engine(kvpolicy.load("rkv", budget=24, backend="triton").build(), [(0,)], 1)
    engine.open(1, 2, None, device, kind="prompt")
    odd = torch.zeros(1, 1, 2, 48, dtype=torch.float16, device=device)
    with pytest.raises(UnsupportedError, match=r"backend: triton cannot be used, because the head dim is 48"):
        engine.append(0, odd, odd)


def test_auto_says_what_it_took(device, caplog):
    dispatch._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="kvpolicy"):
        chosen = kvpolicy.ops.choose_backend("auto", torch.zeros(1, 1, 1, 64, dtype=torch.float16, device=device))
    assert chosen == ("triton" if device.type == "cuda" else "torch")
    assert f"backend: auto takes {chosen}, because the cache is" in caplog.text
