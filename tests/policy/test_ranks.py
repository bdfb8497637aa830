"""Ranks of tensor parallelism: each holds some heads, and all keep what one process with all heads keeps."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy import PolicySpec, UnsupportedError
from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.contracts.view import CacheView

HEADS, SLOTS, LAYERS = 4, 48, 3


class Meeting:
    """Threads that play ranks: each hands in its tensor, all leave with those of everybody."""

    def __init__(self, size):
        self.size, self.barrier, self.parts, self.calls = size, threading.Barrier(size), [None] * size, 0

    def of(self, rank):
        meeting = self

        class Rank:
            def gather(self, tensor):
                meeting.parts[rank] = tensor
                meeting.barrier.wait()
                parts = list(meeting.parts)
                meeting.barrier.wait()
                if rank == 0:
                    meeting.calls += 1
                most = max(part.shape[-1] for part in parts)
                return torch.cat([torch.nn.functional.pad(p, (0, most - p.shape[-1])) for p in parts], -2)

        return Rank()


def views(heads, seed=0, rows=2):
    """What one rank, or all of them, sees of some layers."""
    made = []
    for layer in range(LAYERS):
        generator = torch.Generator().manual_seed(seed + layer)
        keys = torch.randn(rows, HEADS, SLOTS, 16, generator=generator)
        values = torch.randn(rows, HEADS, SLOTS, 16, generator=generator)
        queries = torch.randn(rows, HEADS, 2, 8, 16, generator=generator)
        mine = slice(heads.first, heads.first + heads.here)
        positions = torch.arange(SLOTS, dtype=torch.int32).expand(rows, heads.here, SLOTS)
        at = torch.arange(SLOTS - 8, SLOTS, dtype=torch.int32).expand(rows, 8)
        made.append(
            CacheView(
                keys[:, mine], values[:, mine], positions, torch.ones(rows, heads.here, SLOTS, dtype=torch.bool),
                0.25, layer, LAYERS, torch.full((rows,), 8), torch.full((rows,), SLOTS), torch.full((rows,), 1),
                queries=queries[:, mine], query_positions=at, query_valid=torch.ones(rows, 8, dtype=torch.bool),
                budget=torch.full((rows,), 16), heads=heads,
            )
        )  # fmt: skip
    return made


POLICIES = {
    "one set for a layer": {"selector": {"use": "top_k", "scope": "layer"}},
    "one set for the model": {"selector": {"use": "top_k", "scope": "model", "reduce": "max"}},
    "heads share a budget": {"allocator": "adaptive_heads", "importance": {"use": "window_attention", "observe": 8}},
    "a pool over all layers": {"allocator": "global_pool", "importance": "random"},
    "every head for itself": {},
    "random": {"importance": "random"},
    "drawn": {"selector": "stochastic"},
}


def made(fields):
    whole = {"policy": "p", "budget": 16, "trigger": {"every": 8}, "importance": "key_norm", **fields}
    return PolicySpec(**whole).build()


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_keep_what_one_process_keeps(fields, ranks):
    policy = made(fields)
    whole = policy.decide(views(HeadSpan.whole(HEADS)), [16, 12])
    meeting, share = Meeting(ranks), HEADS // ranks

    def run(rank):
        return policy.decide(views(HeadSpan(rank * share, share, HEADS)), [16, 12], meeting.of(rank))

    with ThreadPoolExecutor(ranks) as pool:
        parts = list(pool.map(run, range(ranks)))
    for layer in range(LAYERS):
        kept = torch.cat([part.kept[layer].mask(SLOTS) for part in parts], 1)
        assert torch.equal(kept, whole.kept[layer].mask(SLOTS))
        assert torch.equal(torch.cat([part.counts[layer] for part in parts], 1), whole.counts[layer])
    assert bool(meeting.calls) == (policy.selector.scope != "head" or policy.allocator.counts == "per_head")


def test_a_rank_whose_heads_hold_fewer_slots_is_padded():
    """Under budgets per head a rank's slots end where its own longest head does."""
    policy = PolicySpec(
        policy="p",
        budget=16,
        trigger={"every": 8},
        importance={"use": "window_attention", "observe": 8},
        allocator="adaptive_heads",
    ).build()
    whole = views(HeadSpan.whole(HEADS))
    short = [
        replace(v, valid=v.valid & ((torch.arange(SLOTS) < 40) | (torch.arange(HEADS)[:, None] < 2))) for v in whole
    ]
    expected = policy.decide(short, [16, 16])
    meeting = Meeting(2)

    def cut(view, rank):
        mine, end = slice(2 * rank, 2 * rank + 2), SLOTS if rank == 0 else 40
        parts = {n: getattr(view, n)[:, mine, :end] for n in ("keys", "values", "positions", "valid")}
        return replace(view, **parts, queries=view.queries[:, mine], heads=HeadSpan(2 * rank, 2, HEADS))

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda r: policy.decide([cut(v, r) for v in short], [16, 16], meeting.of(r)), range(2)))
    for layer in range(LAYERS):
        kept = torch.cat([part.kept[layer].mask(SLOTS) for part in parts], 1)
        assert torch.equal(kept, expected.kept[layer].mask(SLOTS))


@pytest.mark.parametrize("name", ["one set for a layer", "heads share a budget"])
def test_alone_with_some_of_the_heads_is_refused_where_heads_decide_together(name):
    policy = made(POLICIES[name])
    with pytest.raises(UnsupportedError, match=r"layer 0: .*, and 2 of 4 heads are here; give the cache `ranks`"):
        policy.decide(views(HeadSpan(2, 2, HEADS)), [16, 16])


def test_registered_policies_of_heads_alone_need_no_other_rank():
    spec = kvpolicy.load("rkv", budget=24)
    kept = spec.build().decide(views(HeadSpan(2, 2, HEADS)), [24, 24]).kept
    whole = spec.build().decide(views(HeadSpan.whole(HEADS)), [24, 24]).kept
    for mine, every in zip(kept, whole, strict=True):
        assert torch.equal(mine.indices, every.indices[:, 2:])
