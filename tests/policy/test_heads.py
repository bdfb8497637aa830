"""A view of some of the model's heads: what belongs to a head goes by its number in the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy.contracts.components import AllocationRequest
from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.contracts.view import CacheView, Rope
from kvpolicy.errors import UnsupportedError
from kvpolicy.loading.installed import catalog
from kvpolicy.policy.fuse import folded
from kvpolicy.testing.laws.inputs import large_case
from kvpolicy.testing.tables import stand_in_tables

POLICIES = [entry.name for entry in catalog().policies()]
LAST, SPAN = [2, 3], HeadSpan(2, 2, 4)


@pytest.fixture(autouse=True)
def _tables():
    """The shipped tables are of another model."""
    with stand_in_tables():
        yield


def four_heads(policy, seed=0):
    """Four heads with keys and values of their own."""

    def turned(view: CacheView) -> CacheView:
        keys, values = (torch.cat([x[:, :2], x[:, 2:].flip(-1)], 1) for x in (view.keys, view.values))
        return replace(view, keys=keys, values=values)

    slots = max(150, policy.reserved() + 50)
    return large_case(policy, slots=slots, seed=seed).with_heads([0, 1, 0, 1]).by_view(turned)


def some(case):
    """The last two heads, as a rank that holds no others sees them."""
    return case.with_heads(LAST).by_view(lambda view: replace(view, heads=SPAN))


@pytest.mark.parametrize("name", POLICIES)
def test_some_heads_keep_what_they_keep_among_all(name):
    policy = kvpolicy.load(name).build()
    whole = four_heads(policy)
    part = some(whole)
    if policy.selector.scope != "head" or policy.allocator.counts == "per_head":
        with pytest.raises(UnsupportedError, match=r"layer 0: .* 2 of 4 heads are here; give the cache `ranks`"):
            policy.select(part.views, part.budget)
        return
    (expected,), (got,) = policy.select(whole.views, whole.budget), policy.select(part.views, part.budget)
    assert torch.equal(expected.indices[:, LAST], got.indices)
    assert (got.lengths < whole.view.shape[2]).all()
    if name == "random":
        first = policy.select(whole.with_heads([0, 1]).views, whole.budget)[0]
        assert not torch.equal(first.indices, got.indices)


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize("name", ["rkv", "random"])
def test_heads_that_decide_together_are_not_decided_for_alone(name, scope):
    policy = kvpolicy.load(name).replace("selector.scope", scope).build()
    case = some(four_heads(policy))
    with pytest.raises(UnsupportedError, match=rf"layer 0: top_k \(scope '{scope}'\) lets all heads decide together"):
        policy.select(case.views, case.budget)
    policy = kvpolicy.load(name).replace("allocator", "global_pool").build() if name == "random" else None
    if policy is not None:
        with pytest.raises(UnsupportedError, match="layer 0: global_pool splits one budget over all heads"):
            policy.select(case.views, case.budget)


@pytest.mark.parametrize("name", ["table", "table_curve", "table_gate"])
def test_tables_are_read_at_the_heads_that_are_here(name):
    """Two ranks with half of the heads each, and half of the entries: shares follow the heads' own rows."""
    allocator = catalog().get("allocator", name)(table="any")
    layers, held = [0, 1, 2], 90

    def shares(heads):
        valid = [torch.full((1, heads.here), held)] * 3
        marks = [torch.ones(1, heads.here, held, dtype=torch.bool)] * 3
        nothing = [m & False for m in marks]
        scores = [m.float() for m in marks]
        protected = [v * 0 for v in valid]
        budget = torch.tensor([30])
        return torch.stack(
            allocator.allocate(
                AllocationRequest(budget, valid, protected, scores, marks, layers, 3, nothing, [heads] * 3)
            )
        )

    whole, first, last = shares(HeadSpan.whole(4)), shares(HeadSpan(0, 2, 4)), shares(SPAN)
    assert first.sum() == last.sum() == 30 * 6
    assert not torch.equal(first, last)
    # What gets clearly more among all heads does not get less here.
    for part, among in ((first.flatten(), whole[..., :2].flatten()), (last.flatten(), whole[..., 2:].flatten())):
        more = among[:, None] > among[None, :] + 2
        assert more.any()
        assert (part[:, None] >= part[None, :])[more].all()


def test_layers_of_other_heads_are_not_folded_and_folding_keeps_the_span():
    keys = torch.randn(3, 1, 2, 40, 8)
    positions = torch.arange(40, dtype=torch.int32).expand(1, 2, 40)
    ones = torch.ones(1, 2, 40, dtype=torch.bool)
    one = torch.tensor([1])
    views = [CacheView(k, k, positions, ones, 0.3, i, 3, one, one * 40, one, heads=SPAN) for i, k in enumerate(keys)]
    ((together, count),) = folded(views)
    assert (together.heads, count) == (SPAN, 3)
    views[1] = replace(views[1], heads=HeadSpan(0, 2, 4))
    assert [count for _, count in folded(views)] == [1, 1, 1]


def test_a_span_fits_its_tensors():
    view = four_heads(kvpolicy.load("random").build()).view
    assert view.head_span == HeadSpan.whole(4)
    assert SPAN.numbers(view.device).tolist() == LAST
    assert torch.equal(SPAN.of(view.keys, 1), view.keys[:, 2:])
    assert not SPAN.complete
    with pytest.raises(ValueError, match="heads says that 2 heads are here and keys hold 4"):
        replace(view, heads=SPAN)
    for wrong in ((-1, 2, 4), (3, 2, 4), (0, -1, 4)):
        with pytest.raises(ValueError, match="are not among"):
            HeadSpan(*wrong)


def test_the_next_position_is_each_heads_own():
    """Heads whose newest entries are turned back by different amounts, seen together and alone."""
    scorer = catalog().get("importance", "expected_attention")(future=8)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 3, 12, 8, generator=generator)
    positions = torch.arange(12, dtype=torch.int32).expand(1, 3, 12)
    turned = positions - torch.tensor([0, 3, 5], dtype=torch.int32)[:, None]
    root = torch.randn(1, 3, 2, 8, 8, generator=generator)
    whole = CacheView(
        keys, keys, positions, torch.ones(1, 3, 12, dtype=torch.bool), 0.35, 0, 1,
        torch.tensor([4]), torch.tensor([12]), torch.tensor([0]),
        rope=Rope(torch.tensor([1.0, 0.5, 0.1, 0.02])), rope_positions=turned,
        extras={
            "query_mean": torch.randn(1, 3, 2, 8, generator=generator),
            "query_covariance": root @ root.transpose(-1, -2), "query_count": torch.tensor([9]),
        },
    )  # fmt: skip
    some = replace(
        whole, keys=keys[:, 1:], values=keys[:, 1:], positions=positions[:, 1:], valid=whole.valid[:, 1:],
        rope_positions=turned[:, 1:], heads=HeadSpan(1, 2, 3),
        extras={k: v if k == "query_count" else v[:, 1:] for k, v in whole.extras.items()},
    )  # fmt: skip
    assert torch.allclose(scorer.score(whole)[:, 1:], scorer.score(some), atol=1e-6)
