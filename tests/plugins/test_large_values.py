"""Values that stay because they are large, against plain Python."""

from __future__ import annotations

import pytest
import torch

import kvpolicy


def make(**params):
    return kvpolicy.catalog().get("protection", "large_values")(**params)


@pytest.mark.parametrize("measure", ["range", "length"])
@pytest.mark.parametrize(("count", "newest"), [(4, 5), (0, 5), (50, 3), (3, 50), (6, 0)])
def test_the_largest_of_what_is_older_stay(make_view, measure, count, newest):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(2, 2, 20, 8, generator=generator)
    values[0, 0, 7] = values[0, 0, 2]  # equal ones: the older goes first
    valid = torch.ones(2, 2, 20, dtype=torch.bool)
    valid[0, 1, 3] = valid[1, :, 15:] = False
    view = make_view(
        shape=(2, 2, 20, 8),
        values=values.masked_fill(~valid[..., None], float("nan")),
        valid=valid,
        seen=torch.tensor([20, 15]),
    )
    protection = make(count=count, newest=newest, measure=measure)
    got = protection.mask(view)
    assert protection.reserved(1000) == count
    for b in range(2):
        for h in range(2):
            slots = [n for n in range(20) if valid[b, h, n]]
            older = [n for n in slots if n < int(view.seen[b]) - newest]

            def size(n, b=b, h=h):
                value = values[b, h, n].tolist()
                return max(value) - min(value) if measure == "range" else sum(x * x for x in value) ** 0.5

            expected = sorted(sorted(older, key=lambda n: (-size(n), n))[:count])
            assert got[b, h].nonzero()[:, 0].tolist() == expected


def test_vase_keeps_the_largest_values_and_draws_the_rest(make_view):
    """Outliers among the values stay however the lots fall, and lots differ between compactions."""
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(1, 2, 200, 8, generator=generator)
    values[:, 0, [20, 50, 90]] *= 50
    queries = torch.randn(1, 2, 2, 16, 8, generator=generator)
    policy = (
        kvpolicy.load("vase")
        .replace({"budget.tokens": 60, "protect.recent": 16, "protect.large_values": {"count": 8, "newest": 16}})
        .build()
    )
    kept = []
    for compaction in range(4):
        view = make_view(shape=(1, 2, 200, 8), values=values, queries=queries, compaction=torch.tensor([compaction]))
        (one,) = policy.select([view], [60])
        assert one.lengths.tolist() == [[60, 60]]
        kept.append(set(one.indices[0, 0].tolist()))
        assert {0, 1, 2, 3, 20, 50, 90, *range(184, 200)} <= kept[-1]
    assert len({frozenset(one) for one in kept}) == 4
