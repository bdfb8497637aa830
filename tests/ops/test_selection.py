from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvpolicy import ops
from kvpolicy.types import KeepIndices


@st.composite
def selections(draw):
    """Scores with many ties, masks, and a count between protected and valid per head."""
    n = draw(st.integers(0, 12))
    heads = draw(st.integers(1, 3))
    rows = st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0]), min_size=n, max_size=n)
    flags = st.lists(st.booleans(), min_size=n, max_size=n)
    scores, protected, valid, counts = [], [], [], []
    for _ in range(heads):
        scores.append(draw(rows))
        valid.append(draw(flags))
        protected.append(draw(flags))
        least = sum(p and v for p, v in zip(protected[-1], valid[-1], strict=True))
        counts.append(draw(st.integers(least, sum(valid[-1]))))
    shape = (1, heads, n)
    return (
        torch.tensor(scores).reshape(shape).float(),
        torch.tensor([counts]),
        torch.tensor(protected, dtype=torch.bool).reshape(shape),
        torch.tensor(valid, dtype=torch.bool).reshape(shape),
    )


@given(selections(), st.integers(0, 3))
def test_equals_sorting_by_hand(case, spare):
    scores, counts, protected, valid = case
    poisoned = torch.where(valid, scores, float("nan"))
    width = int(counts.max()) + spare
    kept = ops.top_k(poisoned, counts, protected, valid, width=width)
    assert kept.indices.shape == (1, scores.shape[1], width)
    assert kept.indices.dtype == torch.int64
    assert kept.lengths.tolist() == counts.tolist()
    for h in range(scores.shape[1]):
        count = int(counts[0, h])
        order = sorted(
            (s for s in range(scores.shape[2]) if valid[0, h, s]),
            key=lambda s: (not protected[0, h, s], -float(scores[0, h, s]), s),
        )
        expected = sorted(order[:count])
        padding = [expected[-1] if expected else 0] * (width - count)
        assert kept.indices[0, h].tolist() == expected + padding
    if spare == 0:
        assert ops.top_k(poisoned, counts, protected, valid).indices.tolist() == kept.indices.tolist()


def test_constant_added_changes_nothing_and_more_budget_keeps_a_superset():
    scores, mask = torch.randn(2, 3, 40), torch.ones(2, 3, 40, dtype=torch.bool)
    sets = []
    for count in (5, 17, 40):
        counts = torch.full((2, 3), count)
        kept = ops.top_k(scores, counts, ~mask, mask)
        assert torch.equal(kept.indices, ops.top_k(scores + 4.0, counts, ~mask, mask).indices)
        sets.append(set(kept.indices[1, 2].tolist()))
    assert sets[0] < sets[1] < sets[2] == set(range(40))


def test_infinite_scores_do_not_beat_protection():
    scores = torch.tensor([[[1e38, 0.0, 3e38]]])
    kept = ops.top_k(scores, torch.tensor([[1]]), torch.tensor([[[False, True, False]]]), torch.ones(1, 1, 3).bool())
    assert kept.indices.tolist() == [[[1]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool])
def test_compact_moves_to_the_front_in_place(dtype):
    arena = (
        (torch.randn(2, 2, 3, 9, 4) > 0).to(dtype)
        if dtype == torch.bool
        else torch.randn(2, 2, 3, 9, 4).mul(9).to(dtype)
    )
    before = arena.clone()
    kept = KeepIndices(torch.tensor([[[0, 3, 8], [2, 2, 2], [1, 2, 2]]] * 2), torch.tensor([[3, 1, 2]] * 2))
    ops.compact(arena[1], kept)  # a slice of a larger arena, as stores hold it
    for b in range(2):
        for h in range(3):
            assert torch.equal(arena[1, b, h, :3], before[1, b, h, kept.indices[b, h]])
    assert torch.equal(arena[1, :, :, 3:], before[1, :, :, 3:])
    assert torch.equal(arena[0], before[0])


def test_compact_slot_state_and_nothing():
    state = torch.arange(6).float().reshape(1, 1, 6)
    ops.compact(state, KeepIndices(torch.tensor([[[1, 4]]]), torch.tensor([[2]])))
    assert state.tolist() == [[[1, 4, 2, 3, 4, 5]]]
    ops.compact(state, KeepIndices(torch.empty(1, 1, 0, dtype=torch.int64), torch.tensor([[0]])))
    assert state.tolist() == [[[1, 4, 2, 3, 4, 5]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("trailing", [(), (64,), (5, 13), (200,)])
@pytest.mark.parametrize("columns", [1, 30, 90])
def test_compact_moves_wide_and_narrow_slots_alike(dtype, trailing, columns):
    """Heads whose slots are wide are moved one by one on a CPU."""
    torch.manual_seed(columns)
    arena = torch.randn(3, 2, 3, 100, *trailing).mul(9).to(dtype)
    indices = torch.stack([torch.randperm(95)[:columns].sort().values for _ in range(6)]).view(2, 3, columns)
    before = arena.clone()
    ops.compact(arena[1], KeepIndices(indices, torch.full((2, 3), columns)))
    for row in range(2):
        for head in range(3):
            assert torch.equal(arena[1, row, head, :columns], before[1, row, head, indices[row, head]])
            assert torch.equal(arena[1, row, head, columns:], before[1, row, head, columns:])
    assert torch.equal(arena[[0, 2]], before[[0, 2]])
