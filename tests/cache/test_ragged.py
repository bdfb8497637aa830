"""The ragged store and the attention over it, against the same thing head by head in float64."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import ops
from kvpolicy.cache.store import BLOCK, Layout, RaggedStore, Rows, SlotTensors
from kvpolicy.cache.store.ragged import Base
from kvpolicy.contracts.components import SlotState
from kvpolicy.errors import CacheStateError
from kvpolicy.types import KeepIndices

B, H, G, D, DV = 2, 3, 2, 8, 6


def slots(count: int, dtype: torch.dtype = torch.float32) -> SlotTensors:
    positions = torch.arange(count, dtype=torch.int32).expand(B, H, -1)
    return SlotTensors(
        torch.randn(B, H, count, D).to(dtype), torch.randn(B, H, count, DV).to(dtype), positions, positions,
        {"memory": torch.rand(B, H, count)}, torch.ones(B, H, count, dtype=torch.bool),
    )  # fmt: skip


def tails(*lengths: int) -> Rows:
    return Rows.of(range(len(lengths)), lengths)


def some(count: int, share: float = 0.4) -> torch.Tensor:
    kept = torch.rand(B, H, count) < share
    kept[0, 1] = False  # one head keeps nothing at all
    kept[1, 2] = True
    return kept


def dense_attention(queries, keys, values, seen, scale, softcap, sinks):
    """One query head at a time: `keys[b][h]` and `seen[b][h]` `[q, n]`."""
    rows = []
    for b in range(B):
        for head in range(H * G):
            h = head // G
            logits = queries[b, head].double() @ keys[b][h].double().T * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits.masked_fill(~seen[b][h], -torch.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks[h, head % G].double().expand(len(logits), 1)], 1)
            weights = logits.softmax(-1)[:, : keys[b][h].shape[0]]
            rows.append(weights @ values[b][h].double())
    return torch.stack(rows).unflatten(0, (B, H * G))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("count", [1, 5])
def test_attention_over_base_and_tail(softcap, with_sinks, count):
    torch.manual_seed(count)
    held, kept, tail = slots(50), some(50), 7
    base = Base.of(held, kept)
    tail_keys, tail_values = torch.randn(B, H, tail, D), torch.randn(B, H, tail, DV)
    queries = torch.randn(B, H * G, count, D)
    visible = torch.ones(count, tail, dtype=torch.bool).tril(tail - count).expand(B, 1, -1, -1).clone()
    visible[1, :, :, 3] = False
    sinks = torch.randn(H, G) if with_sinks else None
    keys = [[torch.cat([held.keys[b, h][kept[b, h]], tail_keys[b, h]]) for h in range(H)] for b in range(B)]
    values = [[torch.cat([held.values[b, h][kept[b, h]], tail_values[b, h]]) for h in range(H)] for b in range(B)]
    seen = [
        [torch.cat([torch.ones(count, int(kept[b, h].sum()), dtype=torch.bool), visible[b, 0]], 1) for h in range(H)]
        for b in range(B)
    ]
    base.arenas["keys"][base.filled < BLOCK, -1] = 1e4  # a free slot holds anything finite
    found = ops.ragged_attention(
        queries, base.blocks, tail_keys, tail_values, visible, scale=0.3, softcap=softcap, attention_sinks=sinks
    )
    expected = dense_attention(queries, keys, values, seen, 0.3, softcap, sinks)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=2e-5)


def test_a_base_without_blocks_and_large_logits():
    queries, keys, values = torch.randn(B, H * G, 1, D) * 100, torch.randn(B, H, 4, D) * 100, torch.randn(B, H, 4, DV)
    empty = Base.of(slots(9), torch.zeros(B, H, 9, dtype=torch.bool))
    assert empty.owner.numel() == 0
    found = ops.ragged_attention(queries, empty.blocks, keys, values, None, scale=1.0)
    picked = (queries.view(B, H, G, D) @ keys.transpose(2, 3)).argmax(-1)
    expected = values.gather(2, picked.unsqueeze(-1).expand(-1, -1, -1, DV)).view(B, H * G, 1, DV)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_blocks_hold_what_was_kept_and_little_more():
    held, kept = slots(70, torch.bfloat16), some(70)
    base = Base.of(held, kept)
    counts = kept.sum(-1)
    assert torch.equal(base.counts, counts)
    assert base.arenas["keys"].shape[0] == int(((counts + BLOCK - 1) // BLOCK).sum())
    assert base.owner.tolist() == sorted(base.owner.tolist())
    for b in range(B):
        for h in range(H):
            mine = base.owner == b * H + h
            filled = base.filled[mine]
            got = torch.cat(
                [block[:n] for block, n in zip(base.arenas["keys"][mine], filled, strict=True)] or [held.keys[b, h][:0]]
            )
            assert torch.equal(got, held.keys[b, h][kept[b, h]])
            assert int(filled.sum()) == int(counts[b, h])


@pytest.fixture
def store() -> RaggedStore:
    return RaggedStore(Layout((4,), H, D, DV, torch.float32, torch.device("cpu"), (SlotState("memory"),)), B)


def filled(store: RaggedStore, tail: int = 5) -> tuple[SlotTensors, torch.Tensor]:
    """A base of 40 slots thinned out, and a tail behind it."""
    held, kept = slots(40), some(40)
    store.bases[4] = Base.of(held, kept)
    store.resize(tail, 0)
    store.keys.normal_()
    store.values.normal_()
    store.positions[:] = torch.arange(40, 40 + tail, dtype=torch.int32)
    store.state["memory"].uniform_()
    return held, kept


def test_reading_gives_back_base_and_tail(store):
    held, kept = filled(store)
    read = store.read(4, tails(5, 3))
    for b, tail in enumerate((5, 3)):
        for h in range(H):
            real = read.valid[b, h]
            assert torch.equal(
                read.keys[b, h][real], torch.cat([held.keys[b, h][kept[b, h]], store.keys[0, b, h, :tail]])
            )
            remembered = torch.cat([held.state["memory"][b, h][kept[b, h]], store.state["memory"][0, b, h, :tail]])
            assert torch.equal(read.state["memory"][b, h][real], remembered)
            positions = read.positions[b, h][real].tolist()
            assert positions == [*kept[b, h].nonzero()[:, 0].tolist(), *range(40, 40 + tail)]
    one = store.read(4, Rows.of([1], [3]))
    assert torch.equal(one.keys[0, 2][one.valid[0, 2]], read.keys[1, 2][read.valid[1, 2]])
    assert store.entries(4, [5, 3]) == [int(kept[0].sum()) + 15, int(kept[1].sum()) + 9]


def test_slot_state_is_written_where_it_belongs(store):
    filled(store)
    read = store.read(4, tails(5, 5))
    new = torch.rand_like(read.state["memory"])
    store.write(4, tails(5, 5), {"state.memory": new})
    again = store.read(4, tails(5, 5))
    assert torch.equal(again.state["memory"][again.valid], new[read.valid])
    assert torch.equal(again.keys[again.valid], read.keys[read.valid])


def test_keeping_packs_base_and_tail_and_counts_what_is_left(store):
    filled(store)
    before = store.read(4, tails(5, 3))
    wanted = before.valid & (torch.rand(before.valid.shape) < 0.6)
    indices = (~wanted).to(torch.int8).argsort(dim=-1, stable=True)
    with pytest.raises(CacheStateError, match="whole batch"):
        store.keep(Rows.of([1], [3]), {4: KeepIndices(indices[1:], wanted[1:].sum(-1))})
    left = store.keep(tails(5, 3), {4: KeepIndices(indices, wanted.sum(-1))})
    assert left.lengths == tuple(-(-int(row.sum()) // H) for row in wanted)
    assert store.capacity == 0
    after = store.read(4, tails(0, 0))
    for b in range(B):
        for h in range(H):
            assert torch.equal(after.keys[b, h][after.valid[b, h]], before.keys[b, h][wanted[b, h]])


def test_rows_are_reordered_repeated_and_dropped(store):
    filled(store)
    before = store.read(4, tails(5, 5))
    store.rows(torch.tensor([1, 1, 0]))
    after = store.read(4, tails(5, 5, 5))
    for new, old in enumerate((1, 1, 0)):
        assert torch.equal(after.values[new][after.valid[new]], before.values[old][before.valid[old]])
    queries = torch.randn(3, H * G, 1, D)
    base = store.base(4)
    assert base is not None
    all_rows = ops.ragged_attention(queries, base.blocks, store.keys[0], store.values[0], None, scale=0.5)
    store.rows(torch.tensor([2]))
    base = store.base(4)
    assert base is not None
    one = ops.ragged_attention(queries[2:], base.blocks, store.keys[0], store.values[0], None, scale=0.5)
    torch.testing.assert_close(one, all_rows[2:])


def test_a_clone_shares_nothing(store):
    filled(store)
    before = store.read(4, tails(5, 5))
    twin = store.clone()
    for arena in twin.bases[4].arenas.values():
        arena.fill_(0)
    after = store.read(4, tails(5, 5))
    assert torch.equal(after.keys, before.keys)
    assert torch.equal(after.state["memory"], before.state["memory"])
