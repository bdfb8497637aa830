"""Bundled allocators, selectors, protections, triggers and post-operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy import ops
from kvpolicy.contracts.components import AllocationRequest, Counters, Slots
from kvpolicy.errors import UnsupportedError
from kvpolicy.types import KeepIndices


def make(kind, name, **params):
    return kvpolicy.catalog().get(kind, name)(**params)


def test_uniform_gives_the_budget_or_all_there_is():
    valid = [torch.tensor([[9, 9], [3, 3]]), torch.tensor([[9, 9], [3, 3]])]
    request = AllocationRequest(torch.tensor([5, 5]), valid, [v * 0 for v in valid], [], [], [0, 1], 2, [])
    counts = make("allocator", "uniform").allocate(request)
    assert [c.tolist() for c in counts] == [[[5, 5], [3, 3]]] * 2
    assert counts[0].dtype == torch.int64


def test_top_k_component(make_view):
    scores, mask = torch.randn(1, 2, 9), torch.ones(1, 2, 9, dtype=torch.bool)
    slots = Slots.of(make_view(torch.randn(1, 2, 9, 4)))
    kept = make("selector", "top_k").select(scores, torch.tensor([[4, 4]]), ~mask, mask, slots)
    assert torch.equal(kept.indices, scores.topk(4).indices.sort(-1).values)


def test_protections(make_view):
    valid = torch.ones(2, 2, 20, dtype=torch.bool)
    valid[1, :, 15:] = False
    kept = torch.tensor([0, 1, 2, 4, 5, 6, *range(20, 34)], dtype=torch.int32)
    view = make_view(valid=valid, positions=kept.expand(2, 2, 20), prompt_length=torch.tensor([5, 26]))
    sinks, recent = make("protection", "sinks", count=4), make("protection", "recent", count=3)
    assert sinks.mask(view)[0, 0].nonzero().flatten().tolist() == [0, 1, 2], "position 3 is gone"
    assert recent.mask(view)[0, 1].nonzero().flatten().tolist() == [17, 18, 19]
    assert recent.mask(view)[1, 1].nonzero().flatten().tolist() == [12, 13, 14]
    prompt = make("protection", "prompt")
    assert prompt.mask(view).sum(-1).tolist() == [[4, 4], [12, 12]]
    pads = make("protection", "pads")
    assert pads.effect == "drop"
    assert torch.equal(pads.mask(view), ~valid)
    assert [p.reserved(100) for p in (sinks, recent, prompt, pads)] == [4, 3, 100, 0]
    assert not make("protection", "sinks", count=0).mask(view).any()
    assert not make("protection", "recent", count=0).mask(view).any()


def fires(trigger, resident, *, incoming=1, seen=None, budget=100):
    return trigger.fires(Counters(resident, budget, incoming, resident if seen is None else seen, 10))


def test_every_fires_when_the_buffer_is_full():
    every = make("trigger", "every", interval=16)
    assert every.buffer() == 16
    assert [n for n in range(90, 120) if fires(every, n)] == list(range(116, 120))
    assert not fires(every, 100, incoming=50), "nothing to evict"
    assert not fires(every, 90, incoming=50)
    assert fires(every, 101, incoming=50), "a chunk that would overfill what the chunk may fill"
    assert make("trigger", "every") == make("trigger", "every", interval=128, align=1)


def test_every_waits_for_the_block_multiple():
    every = make("trigger", "every", interval=16, align=8)
    assert every.buffer() == 23
    for start in range(8):
        moments = [n for n in range(100, 140) if fires(every, n, seen=start + n)]
        first = moments[0]
        assert (start + first) % 8 == 0
        assert 116 <= first <= 100 + every.buffer()
    assert fires(every, 101, incoming=64, seen=101), "no room to wait"
    assert not fires(every, 117, seen=117, incoming=3)


def test_each_step_is_every_1():
    each, one = make("trigger", "each_step"), make("trigger", "every", interval=1)
    assert each.buffer() == one.buffer() == 1
    for resident in range(95, 106):
        for incoming in (1, 2, 50):
            assert fires(each, resident, incoming=incoming) == fires(one, resident, incoming=incoming)


def test_rerotate_makes_kept_keys_contiguous(make_view):
    """The kept keys look as if their tokens had stood at 0, 1, 2, ... from the start; twice in a row as well."""
    bare = torch.randn(1, 2, 12, 8)
    view = make_view(bare, rope_positions=torch.arange(12, dtype=torch.int32).expand(1, 2, 12))
    view = replace(view, keys=ops.rotate(bare, view.rope, view.positions))
    rerotate = make("post", "rerotate")
    kept = KeepIndices(torch.tensor([[[0, 3, 7, 11], [1, 2, 2, 2]]]), torch.tensor([[4, 2]]))
    changed = rerotate.apply(view, kept)
    assert changed["rope_positions"].dtype == torch.int32
    for h, count in enumerate([4, 2]):
        slots = kept.indices[0, h, :count]
        expected = ops.rotate(bare[0, h, slots], view.rope, torch.arange(count))
        torch.testing.assert_close(changed["keys"][0, h, slots], expected, atol=1e-5, rtol=0)
        assert changed["rope_positions"][0, h, slots].tolist() == list(range(count))

    again = replace(view, keys=changed["keys"], rope_positions=changed["rope_positions"])
    fewer = KeepIndices(torch.tensor([[[3, 11], [1, 2]]]), torch.tensor([[2, 2]]))
    twice = rerotate.apply(again, fewer)["keys"]
    for h in range(2):
        slots = fewer.indices[0, h]
        expected = ops.rotate(bare[0, h, slots], view.rope, torch.arange(2))
        torch.testing.assert_close(twice[0, h, slots], expected, atol=1e-5, rtol=0)
    with pytest.raises(UnsupportedError, match="rotary embedding"):
        rerotate.apply(replace(view, rope=None), kept)


def test_rerotate_leaves_what_is_in_place(make_view):
    view = make_view()
    everything = KeepIndices(torch.arange(20).expand(2, 2, 20), torch.full((2, 2), 20))
    assert torch.equal(make("post", "rerotate").apply(view, everything)["keys"], view.keys)
