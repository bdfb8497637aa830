"""CriticalKV: importance in two stages, against its formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import kvpolicy
from kvpolicy.errors import UnsupportedError


def make(name, **params):
    return kvpolicy.catalog().get("importance", name)(**params)


def critical_view(make_view, **fields):
    generator = torch.Generator().manual_seed(21)
    fields = {"budget": torch.tensor([9, 6])} | fields
    return make_view(
        queries=2 * torch.randn(2, 2, 3, 4, 8, generator=generator),
        extras={"output_projection": torch.randn(2, 3, 8, 24, generator=generator)},
        **fields,
    )


@pytest.mark.parametrize("first_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("base", ["window_attention", "key_norm"])
def test_critical_in_two_stages(make_view, first_share, base):
    valid = torch.ones(2, 2, 20, dtype=torch.bool)
    valid[1, 0, 3], valid[1, 1, 15:] = False, False
    view = critical_view(make_view, valid=valid)
    params: dict[str, Any] = {} if base == "key_norm" else {"observe": 4, "smooth": 1}
    inner = make(base, **params)
    scorer = make("critical", base=inner, first_share=first_share, epsilon=1e-3)
    poisoned = replace(view, values=view.values.masked_fill(~valid[..., None], float("nan")))
    got = scorer.score(poisoned)
    scores, projection = inner.score(view), view.extras["output_projection"].double()
    for b in range(2):
        for h in range(2):
            slots = [n for n in range(20) if valid[b, h, n]]
            lowest = min(0.0, *(scores[b, h, n].item() for n in slots))
            refined = {}
            for n in slots:
                outs = [view.values[b, h, n].double() @ projection[h, g] for g in range(3)]
                norm = sum(float(out.abs().sum()) for out in outs) / 3
                refined[n] = (scores[b, h, n].double().item() - lowest + 1e-3) * norm
            stage = sorted(slots, key=lambda n: (-scores[b, h, n].item(), n))[: int(first_share * [9, 6][b])]
            rest = sorted((n for n in slots if n not in stage), key=lambda n: -refined[n])
            assert sorted(slots, key=lambda n: (-got[b, h, n].item(), n)) == [*stage, *rest]


def test_critical_of_equal_scores(make_view):
    """Without any difference in the base score the values decide, but for the share of the first stage."""
    view = critical_view(make_view)
    got = make("critical", base=make("none"), first_share=0.5).score(view)
    norm = kvpolicy.ops.projected_value_norm(view.values, view.extras["output_projection"], view.valid)
    assert (got[0, 0, :4] >= 2).all()
    assert got[0, 0, 4:].argsort().tolist() == norm[0, 0, 4:].argsort().tolist()


@pytest.mark.parametrize(("fields", "what"), [({"budget": None}, "budget"), ({"extras": {}}, "output projection")])
def test_critical_says_what_is_missing(make_view, fields, what):
    with pytest.raises(UnsupportedError, match=what):
        make("critical").score(replace(critical_view(make_view), **fields))


def test_the_base_of_a_composed_scorer_is_asked_for():
    """Needs and windows of the base are those of the policy."""
    spec = kvpolicy.load("criticalkv").build()
    assert {"weights", "queries"} <= spec.needs
    assert spec.observed_queries == spec.importance.base.observe
