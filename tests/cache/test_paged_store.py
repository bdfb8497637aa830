"""The paged store: blocks, side pages, compaction to the tail, and blocks that others read."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.cache.blocks import live_blocks
from kvpolicy.cache.store import Layout, Rows, Store
from kvpolicy.cache.store.paged import PagedStore
from kvpolicy.contracts.components import SlotState
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.types import KeepIndices

H, D, DV, BLOCK, LAYERS = 2, 4, 6, 4, (1, 5)
STATES = (SlotState("sum"), SlotState("stamp", torch.int32, 7))
LAYOUT = Layout(LAYERS, H, D, DV, torch.float32, torch.device("cpu"), STATES)


@pytest.fixture
def store() -> PagedStore:
    torch.manual_seed(0)
    return PagedStore.allocate(LAYOUT, 16, BLOCK)


def add(store: PagedStore, **counts: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Append tokens with random contents; return them by layer."""
    packed = store.open(counts)
    made = {layer: (torch.randn(packed.tokens, H, D), torch.randn(packed.tokens, H, DV)) for layer in LAYERS}
    for layer, (keys, values) in made.items():
        store.append(layer, keys, values, packed)
    return made


def told(store: PagedStore, *rows: str) -> Rows:
    return Rows.of(rows, [store.tables[row].length for row in rows])


def picked(*heads: list[list[int]]) -> KeepIndices:
    """Kept slots of each head, for one row after the other; rows may differ in their number."""
    width = max(len(head) for row in heads for head in row)
    padded = [[head + [head[-1]] * (width - len(head)) for head in row] for row in heads]
    return KeepIndices(torch.tensor(padded), torch.tensor([[len(head) for head in row] for row in heads]))


def test_a_paged_store_is_a_store(store):
    known: Store = store
    assert known.layout is LAYOUT


def test_tokens_lie_where_an_engine_puts_them_and_are_read_in_order(store):
    store.bind("a", [3, 0])
    store.bind("b", [7])
    first = add(store, a=5, b=2)
    store.extend("b", [9])
    second = add(store, b=3, a=1)
    for layer in LAYERS:
        assert torch.equal(store._keys[layer][3], first[layer][0][:4])
        assert torch.equal(store._keys[layer][0, :2], torch.stack([first[layer][0][4], second[layer][0][3]]))
        wanted = torch.cat([first[layer][1][5:], second[layer][1][:3]])
        held = store.read(layer, told(store, "b"))
        assert torch.equal(held.values[0], wanted.transpose(0, 1))
        assert held.positions[0].tolist() == [[0, 1, 2, 3, 4]] * H
        assert held.rope_positions is held.positions
        assert held.state["stamp"].unique().tolist() == [7]
        both = store.read(layer, told(store, "a", "b"))
        assert both.valid.sum(-1).tolist() == [[6, 6], [5, 5]]
        assert torch.equal(both.keys[1, :, :5], held.keys[0])
        assert bool(torch.isfinite(both.keys).all())


@pytest.mark.parametrize("kept", [4, 5, 8, 1])
def test_what_is_kept_moves_to_the_tail_and_the_head_is_free(store, kept):
    store.bind("a", [3, 0, 8])
    store.bind("b", [5])
    made, other = add(store, a=11), add(store, b=3)
    store.state["sum"][:] = store.positions * 10.0
    choice = {layer: picked([sorted(torch.randperm(11)[:kept].tolist()) for _ in range(H)]) for layer in LAYERS}
    left = store.keep(told(store, "a"), choice)
    assert left.lengths == (kept,)
    live = live_blocks(11, kept, BLOCK)
    assert left.freed == ({"a": tuple([3, 0, 8][: live.start])} if live.start else {})
    assert store.tables["a"].live == [3, 0, 8][live.start :]
    for layer in LAYERS:
        held = store.read(layer, told(store, "a"))
        at = choice[layer].indices[0]
        assert held.positions[0].tolist() == at.tolist()
        assert held.state["sum"][0].tolist() == (at * 10.0).tolist()
        for h in range(H):
            assert torch.equal(held.keys[0, h], made[layer][0][at[h], h])
            assert torch.equal(held.values[0, h], made[layer][1][at[h], h])
            assert torch.equal(store.read(layer, told(store, "b")).keys[0, h], other[layer][0][:, h])
    # The next token is stored where an engine that knows nothing of this puts it.
    more = add(store, a=1)
    assert torch.equal(store._keys[1][8, 3], more[1][0][0])
    assert store.read(1, told(store, "a")).positions[0, :, -1].tolist() == [11] * H


def test_rows_of_different_lengths_are_kept_in_one_go(store):
    store.bind("a", [3, 0, 8])
    store.bind("b", [5, 6])
    made, other = add(store, a=11), add(store, b=6)
    choice = picked([[0, 2, 9], [1, 3, 10]], [[0, 1, 2, 4, 5], [1, 2, 3, 4, 5]])
    left = store.keep(told(store, "a", "b"), dict.fromkeys(LAYERS, choice))
    assert left.lengths == (3, 5)
    assert left.freed == {"a": (3, 0)}
    for h, at in enumerate(([0, 2, 9], [1, 3, 10])):
        assert torch.equal(store.read(5, told(store, "a")).keys[0, h], made[5][0][at, h])
    for h, at in enumerate(([0, 1, 2, 4, 5], [1, 2, 3, 4, 5])):
        assert torch.equal(store.read(5, told(store, "b")).keys[0, h], other[5][0][at, h])


def test_state_of_rows_of_different_lengths_is_written_where_it_belongs(store):
    store.bind("a", [3, 0])
    store.bind("b", [5])
    add(store, a=6, b=2)
    rows = told(store, "a", "b")
    new = torch.rand(2, H, 6)
    store.write(1, rows, {"state.sum": new})
    held = store.read(1, rows)
    assert torch.equal(held.state["sum"][held.valid], new[held.valid])
    assert not store.state["sum"][1].any(), "the other layer is as it was"
    assert int((store.state["sum"][0] != 0).sum()) == (6 + 2) * H


def test_whole_blocks_begin_with_a_block_whatever_is_kept():
    """Entries move on to the start of a block, and later tokens stand as many slots before their positions."""
    store = PagedStore.allocate(LAYOUT, 16, BLOCK, whole_blocks=True)
    store.bind("a", [3, 0, 8, 9, 7])
    made = add(store, a=11)
    keys = {layer: made[layer][0] for layer in LAYERS}
    held, first = list(range(11)), 0
    # Five are kept of 11, 13, 16 and 17 tokens: rows begin at slots 6, 8, 11 and 12, or at the first of their block.
    for kept, more, freed, shift in (
        ([0, 1, 2, 3, 10], 2, (3,), 2), ([0, 3, 4, 5, 6], 3, (0,), 0), ([0, 2, 3, 4, 7], 1, (), 3),
        ([0, 1, 3, 4, 5], 3, (8,), 0),
    ):  # fmt: skip
        left = store.keep(told(store, "a"), dict.fromkeys(LAYERS, picked([kept] * H)))
        held, first, table = [held[i] for i in kept], first + BLOCK * len(freed), store.tables["a"]
        assert (left.freed, left.lengths) == ({"a": freed} if freed else {}, (5,))
        assert (table.first, table.end, table.shift) == (first, first + 5, shift)
        seen = table.end + table.shift
        new = add(store, a=more)
        held += range(seen, seen + more)
        for layer in LAYERS:
            keys[layer] = torch.cat([keys[layer], new[layer][0]])
            read = store.read(layer, told(store, "a"))
            assert read.positions[0].tolist() == [held] * H
            assert torch.equal(read.keys[0], keys[layer][held].transpose(0, 1))


def test_heads_that_keep_different_numbers_are_refused(store):
    store.bind("a", [3])
    add(store, a=4)
    with pytest.raises(UnsupportedError, match="equal_counts"):
        store.keep(told(store, "a"), dict.fromkeys(LAYERS, picked([[0, 1], [0]])))
    assert store.tables["a"].length == 4


def test_re_rotated_keys_are_refused_by_the_trait():
    layout = Layout(LAYERS, H, D, DV, torch.float32, torch.device("cpu"), re_rotates=True)
    with pytest.raises(UnsupportedError, match="trait re_rotates"):
        PagedStore.allocate(layout, 4, BLOCK)


# -- blocks ----------------------------------------------------------------------------------------------------------


def test_what_counts_and_what_stores_may_not_come_apart(store):
    store.bind("a", [3])
    add(store, a=3)
    with pytest.raises(CacheStateError, match="'a' holds 3 entries, but 2 were counted"):
        store.read(1, Rows.of(["a"], [2]))
    with pytest.raises(CacheStateError, match="not bound"):
        store.read(1, Rows.of(["b"], [2]))


@pytest.mark.parametrize(
    ("blocks", "said"),
    [([3], "another row's"), ([5, 5], "comes twice"), ([16], "none of the 16"), ([-1], "none of the 16")],
)
def test_blocks_of_others_are_refused(store, blocks, said):
    store.bind("a", [3])
    with pytest.raises(CacheStateError, match=said):
        store.bind("b", blocks)
    with pytest.raises(CacheStateError, match=said):
        store.extend("a", blocks)
    assert "b" not in store.tables
    assert store.release("a") == (3,)
    assert not store.tables.readers(3)


def test_a_token_without_a_block_is_refused(store):
    store.bind("a", [3])
    with pytest.raises(CacheStateError, match="1 blocks of 4 for 0 tokens and 5 more"):
        store.open({"a": 5})


def test_tokens_are_taken_back_to_the_last_compaction(store):
    store.bind("a", [3, 0, 8])
    add(store, a=6)
    store.keep(told(store, "a"), dict.fromkeys(LAYERS, picked([[0, 5]] * H)))
    add(store, a=3)
    store.retract("a", 2)
    assert store.read(1, told(store, "a")).positions[0, 0].tolist() == [0, 5, 6]
    with pytest.raises(CacheStateError, match="before the last compaction"):
        store.retract("a", 2)
    add(store, a=1)
    assert store.read(1, told(store, "a")).positions[0, 0].tolist() == [0, 5, 6, 7]


def test_a_block_with_two_readers_is_never_written(store):
    store.bind("a", [3, 0])
    made = add(store, a=6)
    store.bind("b", [3, 0], 6)
    assert torch.equal(store.read(1, told(store, "b")).keys, store.read(1, told(store, "a")).keys)
    for write in (
        lambda: store.open({"b": 1}),
        lambda: store.write(1, told(store, "b"), {"state.sum": torch.zeros(1, H, 6)}),
        lambda: store.keep(told(store, "b"), dict.fromkeys(LAYERS, picked([[0, 5]] * H))),
    ):
        with pytest.raises(CacheStateError, match=r"block [30] is read by 2 rows.*copy"):
            write()
    store.copy("b", 0, 11)
    assert store.keep(told(store, "b"), dict.fromkeys(LAYERS, picked([[1, 5]] * H))).freed == {}, "a reads it still"
    assert store.read(1, told(store, "b")).positions[0, 0].tolist() == [1, 5]
    for layer in LAYERS:
        assert torch.equal(store.read(layer, told(store, "a")).keys[0], made[layer][0].transpose(0, 1))
        assert torch.equal(store.read(layer, told(store, "b")).keys[0, 1], made[layer][0][[1, 5], 1])
    assert store.release("a") == (3, 0)
    assert store.release("b") == (11,)


def test_a_prefix_whose_row_has_been_compacted_is_no_prefix(store):
    store.bind("a", [3, 0])
    add(store, a=8)
    store.keep(told(store, "a"), dict.fromkeys(LAYERS, picked([[0, 2, 5, 7]] * H)))
    with pytest.raises(CacheStateError, match="do not hold its first 8 tokens any more"):
        store.bind("b", [3, 0], 8)
    assert store.tables.readers(0) == 1


def test_pages_of_another_shape_are_refused():
    keys = {layer: torch.zeros(4, BLOCK, H, D) for layer in LAYERS}
    values = {layer: torch.zeros(4, H, BLOCK, DV) for layer in LAYERS}
    with pytest.raises(CacheStateError, match=r"layer 1: pages of shape \[4, 2, 4, 6\]"):
        PagedStore(LAYOUT, keys, values)


def test_pages_may_be_parts_of_an_engine_s_tensor():
    layout = Layout(LAYERS, H, D, D, torch.float32, torch.device("cpu"))
    whole = {layer: torch.zeros(8, 2, BLOCK, H, D) for layer in LAYERS}
    halves = [{layer: pages[:, i] for layer, pages in whole.items()} for i in (0, 1)]
    store = PagedStore(layout, *halves)
    store.bind("a", [6, 2])
    packed = store.open({"a": 6})
    keys, values = torch.randn(6, H, D), torch.randn(6, H, D)
    store.append(5, keys, values, packed)
    assert torch.equal(whole[5][6, 1], values[:4])
    store.keep(told(store, "a"), dict.fromkeys(LAYERS, picked([[0, 1, 2], [3, 4, 5]])))
    assert torch.equal(whole[5][6, 0, 3], torch.stack([keys[0, 0], keys[3, 1]]))
