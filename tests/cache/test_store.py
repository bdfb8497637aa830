"""The arena store: writing, growing, compacting in place."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.cache.store import ArenaStore, Layout, Rows
from kvpolicy.cache.store.arena import WritePlan
from kvpolicy.contracts.components import SlotState
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.types import KeepIndices

STATES = (SlotState("sum"), SlotState("stamp", torch.int32, 7))


def make(batch=2, heads=2, layers=(1, 4), capacity=8, *, re_rotates=False, dtype=torch.float32):
    store = ArenaStore(Layout(layers, heads, 4, 6, dtype, torch.device("cpu"), STATES, re_rotates), batch)
    store.resize(capacity, 0)
    return store


def equal_rows(start, width, shift=0):
    positions = torch.arange(start, start + width, dtype=torch.int32)
    return WritePlan(start, width, start + width, positions, positions - shift)


def fill(store, count=6):
    """Append `count` tokens to every row; keys and values hold random numbers that are returned."""
    plan = equal_rows(0, count)
    store.append_slots(plan)
    made = {}
    for layer in store.layers:
        keys = torch.randn(store.batch, store.layout.heads, count, 4)
        values = torch.randn(store.batch, store.layout.heads, count, 6)
        store.append(layer, keys, values, plan)
        made[layer] = keys, values
    return made


def test_the_layout_is_read_off_the_tensors():
    keys, values = torch.zeros(3, 2, 7, 4, dtype=torch.bfloat16), torch.zeros(3, 2, 7, 6, dtype=torch.bfloat16)
    layout = Layout.of([1, 4], keys, values, STATES, re_rotates=True)
    assert layout == Layout((1, 4), 2, 4, 6, torch.bfloat16, torch.device("cpu"), STATES, re_rotates=True)


def test_rows_that_are_alike_are_written_as_one_slice():
    store = make()
    made = fill(store, 5)
    plan = equal_rows(5, 2)
    store.append_slots(plan)
    keys, values = torch.randn(2, 2, 2, 4), torch.randn(2, 2, 2, 6)
    all_keys, all_values = store.append(4, keys, values, plan)
    assert torch.equal(all_keys, torch.cat([made[4][0], keys], 2))
    assert torch.equal(all_values, torch.cat([made[4][1], values], 2))
    assert all_keys.data_ptr() == store.keys[1].data_ptr(), "a view, not a copy"
    assert store.positions[:, :, :, :7].unique(dim=-2).tolist() == [[[list(range(7))]] * 2] * 2
    assert torch.equal(store.keys[0, :, :, :5], made[1][0]), "the other layer is as it was"


def test_rows_that_differ_are_written_each_in_its_place():
    store = make(batch=3)
    fill(store, 2)
    # Row 0 writes columns 1 and 2 to slots 2 and 3, row 1 nothing, row 2 column 0 to slot 1.
    row, column, slot = torch.tensor([0, 0, 2]), torch.tensor([1, 2, 0]), torch.tensor([2, 3, 1])
    positions = torch.tensor([2, 3, 1], dtype=torch.int32)
    plan = WritePlan(None, 3, 4, positions, positions, row, column, slot)
    store.state["stamp"].zero_()
    store.append_slots(plan)
    before = store.keys.clone()
    keys = torch.full((3, 2, 3, 4), float("nan"))
    keys[0, :, 1], keys[0, :, 2], keys[2, :, 0] = 1.0, 2.0, 3.0
    values = torch.randn(3, 2, 3, 6)
    all_keys, all_values = store.append(1, keys, values, plan)
    assert all_keys.shape == (3, 2, 4, 4)
    assert set(all_keys[0, :, 2].unique().tolist()) == {1.0}
    assert set(all_keys[0, :, 3].unique().tolist()) == {2.0}
    assert set(all_keys[2, :, 1].unique().tolist()) == {3.0}
    assert torch.equal(all_keys[1], before[0, 1, :, :4])
    assert torch.equal(all_values[0, :, 3], values[0, :, 2])
    assert bool(torch.isfinite(all_keys).all()), "padding does not get in"
    assert store.positions[1, 0, 1, :4].tolist() == [0, 1, 2, 3]
    assert store.positions[0, 2, 0, :2].tolist() == [0, 1]
    assert store.state["stamp"][0, :, 0, :4].tolist() == [[0, 0, 7, 7], [0, 0, 0, 0], [0, 7, 0, 0]]


def test_new_slots_have_fresh_state():
    store = make()
    fill(store, 6)
    store.state["sum"].fill_(5.0)
    store.state["stamp"].fill_(5)
    store.append_slots(equal_rows(6, 2))
    assert store.state["sum"][0, 0, 0].tolist() == [5.0] * 6 + [0.0] * 2
    assert store.state["stamp"][1, 1, 1].tolist() == [5] * 6 + [7] * 2
    assert store.state["stamp"].dtype == torch.int32


def test_compaction_moves_everything_alike_and_only_there():
    store = make(re_rotates=True)
    made = fill(store, 6)
    store.state["sum"].copy_(store.positions * 10.0)
    store.rope_positions.copy_(store.positions + 100)
    untouched = [store.keys[1].clone(), store.keys[0, 0].clone(), store.positions[1].clone()]
    indices = torch.tensor([[[0, 2, 5], [1, 3, 4]]])
    store.compact(1, slice(1, 2), KeepIndices(indices, torch.full((1, 2), 3)))
    for h in (0, 1):
        at = indices[0, h]
        assert torch.equal(store.keys[0, 1, h, :3], made[1][0][1, h, at])
        assert torch.equal(store.values[0, 1, h, :3], made[1][1][1, h, at])
        assert store.positions[0, 1, h, :3].tolist() == at.tolist()
        assert store.rope_positions[0, 1, h, :3].tolist() == (at + 100).tolist()
        assert store.state["sum"][0, 1, h, :3].tolist() == (at * 10.0).tolist()
    assert torch.equal(store.keys[1], untouched[0])
    assert torch.equal(store.keys[0, 0], untouched[1])
    assert torch.equal(store.positions[1], untouched[2])


def test_the_second_compaction_never_brings_anything_back():
    store = make(batch=1, capacity=16)
    fill(store, 12)
    held = set(range(12))
    generator = torch.Generator().manual_seed(1)
    for count in (9, 7, 4, 1):
        resident = len(held)
        picked = torch.randperm(resident, generator=generator)[:count].sort().values
        store.compact(1, slice(0, 1), KeepIndices(picked.expand(1, 2, -1), torch.full((1, 2), count)))
        now = store.positions[0, 0, 0, :count].tolist()
        assert set(now) < held
        assert now == sorted(now)
        held = set(now)


@pytest.mark.parametrize("capacity", [6, 9, 100])
def test_resizing_keeps_what_is_used(capacity):
    store = make()
    made = fill(store, 6)
    store.resize(capacity, 6)
    assert store.capacity == store.keys.shape[3] == store.state["sum"].shape[3] == capacity
    for i, layer in enumerate(store.layers):
        assert torch.equal(store.keys[i, :, :, :6], made[layer][0])
        assert torch.equal(store.values[i, :, :, :6], made[layer][1])
    assert not store.keys[:, :, :, 6:].any(), "new room holds no leftovers of memory"
    assert store.rope_positions is store.positions
    if capacity > 6:
        plan = equal_rows(6, 1)
        store.append_slots(plan)
        keys, _ = store.append(1, torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 6), plan)
        assert torch.equal(keys, store.keys[0, :, :, :7]), "writes go to the new arena"


def test_rows_are_taken_and_repeated():
    store = make()
    made = fill(store, 6)
    store.rows(torch.tensor([1, 1, 0]))
    assert store.batch == 3
    assert torch.equal(store.keys[0, 0, :, :6], made[1][0][1])
    assert torch.equal(store.keys[0, 2, :, :6], made[1][0][0])
    plan = equal_rows(6, 1)
    store.append_slots(plan)
    keys, _ = store.append(1, torch.zeros(3, 2, 1, 4), torch.zeros(3, 2, 1, 6), plan)
    assert keys.shape == (3, 2, 7, 4)
    keys[0] = 1.0
    assert not torch.equal(store.keys[0, 0], store.keys[0, 1]), "copies, not views of one row"


@pytest.mark.parametrize("re_rotates", [False, True])
def test_a_clone_shares_nothing(re_rotates):
    store = make(re_rotates=re_rotates)
    made = fill(store, 6)
    twin = store.clone()
    plan = equal_rows(6, 1)
    twin.append_slots(plan)
    twin.append(1, torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 6), plan)
    for arena in (twin.keys, twin.values, twin.positions, twin.rope_positions, *twin.state.values()):
        arena.fill_(3)
    assert torch.equal(store.keys[0, :, :, :6], made[1][0])
    assert not store.keys[:, :, :, 6:].any()
    assert store.positions[0, 0, 0, :6].tolist() == list(range(6))
    assert (twin.rope_positions is twin.positions) != re_rotates


def test_bytes_are_those_of_the_tensors():
    store = make(dtype=torch.bfloat16)
    assert store.layout.bytes_per_entry == (4 + 6) * 2
    assert store.bytes_allocated(store.layers[0])[1] == 2 * 2 * 8 * (4 + 4 + 4)
    assert make(re_rotates=True).bytes_allocated(store.layers[0])[1] == 2 * 2 * 8 * (4 + 4 + 4 + 4)


def test_growing_lets_go_of_the_old_arena():
    store = make()
    fill(store, 5)
    old = store.keys.untyped_storage()._weak_ref()
    store.resize(16, 5)
    assert torch.UntypedStorage._expired(old)
    torch.UntypedStorage._free_weak_ref(old)


# -- keep ------------------------------------------------------------------------------------------------------------


def kept(*counts: int, columns: int = 4) -> KeepIndices:
    """The first so many slots of each head, for one row after the other, `[B, 2, columns]`."""
    index = torch.arange(columns).expand(len(counts) // 2, 2, -1)
    lengths = torch.tensor(counts).view(-1, 2)
    return KeepIndices(torch.minimum(index, lengths[..., None] - 1), lengths)


def test_lengths_are_those_that_were_kept_whatever_was_asked_for():
    store = make()
    fill(store, 6)
    rows = Rows.of([0, 1], [6, 6])
    left = store.keep(rows, {1: kept(3, 3, 4, 4), 4: kept(3, 3, 4, 4)})
    assert left.lengths == (3, 4)
    assert not left.freed
    after = store.read(4, Rows.of([0, 1], left.lengths))
    assert after.valid.sum(-1).tolist() == [[3, 3], [4, 4]]


@pytest.mark.parametrize("second", [(3, 2, 4, 4), (2, 2, 4, 4)])
def test_heads_or_layers_that_keep_different_numbers_are_refused(second):
    store = make()
    fill(store, 6)
    before = store.keys.clone()
    with pytest.raises(UnsupportedError, match=r"row 0: some heads keep 2 entries and others 3.*equal_counts"):
        store.keep(Rows.of([0, 1], [6, 6]), {1: kept(3, 3, 4, 4), 4: kept(*second)})
    assert torch.equal(store.keys, before)


def test_rows_that_do_not_lie_side_by_side_are_refused():
    store = make(batch=3)
    fill(store, 6)
    with pytest.raises(CacheStateError, match="side by side"):
        store.read(1, Rows.of([0, 2], [6, 6]))


def test_small_numbers_are_made_once_for_all_layers():
    rows = Rows.of([0, 1], [6, 4], seen=[9, 8])
    device = torch.device("cpu")
    assert rows.on(device) is rows.on(device)
    assert rows.on(device)["seen"].tolist() == [9, 8]
    assert rows.used(device).tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert rows == Rows.of([0, 1], [6, 4], seen=[9, 8]) != Rows.of([0, 1], [6, 4], seen=[9, 9])
