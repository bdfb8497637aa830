"""Post-operations against dense float64 formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy import ops
from kvpolicy.errors import UnsupportedError
from kvpolicy.types import KeepIndices


def make(name, **params):
    return kvpolicy.catalog().get("post", name)(**params)


def chosen(view, counts, seed=0):
    """Random slots to keep, as many as `counts` `[B][H]` says, among the valid ones."""
    noise = torch.rand(view.shape, generator=torch.Generator().manual_seed(seed))
    return ops.top_k(noise, torch.tensor(counts), torch.zeros_like(view.valid), view.valid)


def spoilt(view):
    """Holes in every head, with NaN in them."""
    valid = torch.rand(view.shape, generator=torch.Generator().manual_seed(9)) > 0.2
    bad = ~valid[..., None]
    return replace(
        view,
        valid=valid,
        keys=view.keys.masked_fill(bad, float("nan")),
        values=view.values.masked_fill(bad, float("nan")),
    )


def merged(view, kept, threshold):
    """Every evicted value to its nearest survivor, one by one in float64."""
    values = view.values.double().clone()
    slots = kept.mask(view.shape[2])
    for b in range(view.shape[0]):
        for h in range(view.shape[1]):
            keys, old = view.keys[b, h].double(), view.values[b, h].double()
            stay = slots[b, h].nonzero()[:, 0].tolist()
            gone = [n for n in view.valid[b, h].nonzero()[:, 0].tolist() if n not in stay]
            added = {s: (torch.zeros(old.shape[-1]).double(), 0.0) for s in stay}
            for n in gone:
                cosines = [float(torch.nn.functional.cosine_similarity(keys[n], keys[s], dim=0)) for s in stay]
                if not cosines or max(cosines) < threshold:
                    continue
                s = stay[cosines.index(max(cosines))]
                w = max(*cosines, 0) * float(old[n].norm() / (old[n].norm() + old[s].norm()))
                added[s] = (added[s][0] + w * old[n], added[s][1] + w)
            for s, (total, weight) in added.items():
                values[b, h, s] = (old[s] + total) / (1 + weight)
    return values


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("counts", [[[7, 12], [1, 9]], [[0, 5], [3, 20]]], ids=["ragged", "a head that keeps nothing"])
def test_merge_values_equals_the_dense_formula(make_view, threshold, counts):
    view = spoilt(make_view(shape=(2, 2, 40, 8)))
    kept = chosen(view, counts)
    before = view.values.clone()
    got = make("merge_values", threshold=threshold).apply(view, kept)["values"]
    assert torch.equal(view.values.nan_to_num(7), before.nan_to_num(7))
    slots = kept.mask(40)
    torch.testing.assert_close(got[slots].double(), merged(view, kept, threshold)[slots], atol=1e-5, rtol=1e-5)
    changed = (got != view.values).any(-1)[slots]
    assert changed.any() == (threshold < 1)
    if threshold == 1:
        assert torch.equal(got[slots], view.values[slots])


def test_merge_values_in_blocks_and_in_half_precision(make_view, monkeypatch):
    view = make_view(shape=(2, 2, 40, 8))
    kept = chosen(view, [[7, 12], [1, 9]])
    whole = make("merge_values").apply(view, kept)["values"]
    monkeypatch.setattr(ops.merging, "_CELLS", 100)  # two evicted entries at a time
    torch.testing.assert_close(make("merge_values").apply(view, kept)["values"], whole, atol=1e-6, rtol=1e-6)
    half = replace(view, keys=view.keys.bfloat16(), values=view.values.bfloat16())
    got = make("merge_values").apply(half, kept)["values"]
    assert got.dtype == torch.bfloat16
    exact = make("merge_values").apply(replace(half, keys=half.keys.float(), values=half.values.float()), kept)[
        "values"
    ]
    assert torch.equal(got, exact.bfloat16())


def test_nothing_evicted_changes_nothing(make_view):
    view = make_view(shape=(1, 2, 10, 8))
    assert torch.equal(make("merge_values").apply(view, chosen(view, [[10, 10]]))["values"], view.values)


def test_merging_stops_at_rows_and_heads(make_view):
    """Twins of evicted keys in another head or row receive nothing."""
    keys = torch.eye(8).repeat(2, 2, 1, 1)
    view = make_view(keys=keys)
    kept = KeepIndices(torch.tensor([[[0, 1, 2, 3]] * 2, [[4, 5, 6, 7]] * 2]), torch.full((2, 2), 4))
    assert torch.equal(make("merge_values", threshold=0.1).apply(view, kept)["values"], view.values)


def pruned(view, kept, ratio, observe, recent):
    """Zeroed channels by the formula, head by head in float64."""
    keys = view.keys.double().clone()
    slots = kept.mask(view.shape[2])
    for b in range(view.shape[0]):
        asked = [q for q in range(view.query_valid.shape[1]) if view.query_valid[b, q]]
        asked = sorted(asked, key=lambda q: int(view.query_positions[b, q]))[-observe:]
        for h in range(view.shape[1]):
            stay = slots[b, h].nonzero()[:, 0].tolist()
            last = view.valid[b, h].nonzero()[:, 0].tolist()[-recent:] if recent else []
            queries = view.queries[b, h].double()[:, asked].square().mean((0, 1))
            worth = queries * view.keys[b, h, stay].double().square().mean(0)
            gone = sorted(range(len(worth)), key=lambda c: (float(worth[c]), c))[: int(ratio * len(worth))]
            for n in set(stay) - set(last):
                keys[b, h, n, gone] = 0
    return keys.float(), slots


@pytest.mark.parametrize(("ratio", "observe", "recent"), [(0.4, 32, 32), (0.4, 4, 8), (0.9, 6, 0), (0.0, 8, 8)])
def test_prune_channels_equals_the_formula(make_view, ratio, observe, recent):
    queries = torch.randn(2, 2, 3, 10, 16, generator=torch.Generator().manual_seed(4))
    view = spoilt(make_view(shape=(2, 2, 60, 16), queries=queries))
    view = replace(view, query_valid=torch.tensor([[True] * 10, [False] * 3 + [True] * 7]))
    view = replace(view, queries=queries.masked_fill(~view.query_valid[:, None, None, :, None], float("nan")))
    kept = chosen(view, [[20, 30], [11, 40]])
    post = make("prune_channels", ratio=ratio, observe=observe, recent=recent)
    assert post.observed_queries() == observe
    got = post.apply(view, kept)["keys"]
    expected, slots = pruned(view, kept, ratio, observe, recent)
    assert torch.equal(got[slots], expected[slots])
    zeros = (got[slots] == 0).sum(-1)
    assert set(zeros.tolist()) <= {0, int(16 * ratio)}
    old = slots & ~view.newest(recent)
    assert ((got == 0).sum(-1)[old] == int(16 * ratio)).all()


def test_prune_channels_needs_queries(make_view):
    view = make_view()
    with pytest.raises(UnsupportedError, match="prune_channels"):
        make("prune_channels").apply(view, chosen(view, [[4, 4], [4, 4]]))


def test_a_row_of_which_no_query_is_known_keeps_its_channels(make_view):
    view = make_view(shape=(2, 1, 20, 8), queries=torch.ones(2, 1, 1, 4, 8))
    view = replace(view, query_valid=torch.tensor([[False] * 4, [True] * 4]))
    got = make("prune_channels", recent=2).apply(view, chosen(view, [[9], [9]]))["keys"]
    assert torch.equal(got[0], view.keys[0])
    assert not torch.equal(got[1], view.keys[1])


def test_what_only_the_newest_queries_use_survives(make_view):
    """Queries look at channel 3 only: it is the last to go."""
    queries = torch.zeros(1, 1, 1, 4, 8)
    queries[..., 3] = 1
    view = make_view(shape=(1, 1, 20, 8), queries=queries)
    got = make("prune_channels", ratio=0.875, recent=2).apply(view, chosen(view, [[20]]))["keys"][0, 0]
    assert (got[:18] != 0).sum(0).tolist() == [0, 0, 0, 18, 0, 0, 0, 0]
    assert torch.equal(got[18:], view.keys[0, 0, 18:])
