"""Scorers that ask what the attention's output loses with an entry, against the papers' formulas in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy.errors import UnsupportedError
from kvsupport import oracle_outputs
from kvsupport.one_head import heads_of

B, H, G, N, D, Q = 2, 2, 3, 20, 8, 6


def make(name, **params):
    return kvpolicy.catalog().get("importance", name)(**params)


@pytest.fixture
def window_view(make_view):
    """Two rows with holes, queries as a ring holds them, and NaN wherever nothing is."""

    def drawn(**fields):
        generator = torch.Generator().manual_seed(5)
        valid = torch.ones(B, H, N, dtype=torch.bool)
        valid[0, 1, 3] = valid[1, :, :4] = valid[1, 0, 9] = False
        at = torch.tensor([[16, 17, 18, 19, 14, 15], [19, 0, 0, 16, 17, 18]], dtype=torch.int32)
        view = make_view(
            shape=(B, H, N, D),
            valid=valid,
            queries=2 * torch.randn(B, H, G, Q, D, generator=generator),
            query_positions=at,
            **({"query_valid": torch.tensor([[True] * 6, [True, False, False, True, True, True]])} | fields),
        )
        gone = ~valid[..., None]
        spoilt = view.keys.masked_fill(gone, float("nan")), view.values.masked_fill(gone, float("nan"))
        return replace(view, keys=spoilt[0], values=spoilt[1])

    return drawn


MODELS = {
    "plain": {},
    "soft-capped": {"softcap": 3.0},
    "with sinks": {"attention_sinks": torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, -2.0]])},
}
SCORERS = [
    ("optimal_brain", {"prune": prune, "observe": observe})
    for prune in ("joint", "key", "value")
    for observe in (1, 4, 16)
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "params"), SCORERS)
def test_the_same_as_the_formula(window_view, name, params, model):
    view = window_view(**MODELS[model])
    scorer = make(name, **params)
    got = scorer.score(view)
    assert (got[~view.valid] == 0).all()
    for b, h, slots, head in heads_of(view):
        wanted = oracle_outputs.IMPORTANCE[name](scorer, head)
        torch.testing.assert_close(got[b, h, slots].double(), wanted, rtol=1e-4, atol=1e-6)
        assert len(wanted.unique()) > 10


@pytest.mark.parametrize("prune", ["joint", "key", "value"])
def test_saliency_is_half_the_curvature_of_the_squared_loss(window_view, prune):
    """What Optimal Brain Damage says: step' Hessian step / 2 of |o - o'|^2, the Hessian made by automatic slopes."""
    view = window_view(softcap=3.0)
    scorer = make("optimal_brain", prune=prune, observe=1)
    _, _, _, head = next(heads_of(view))
    got = scorer.score(view)[0, 0]
    expected = torch.zeros(len(head.positions), dtype=torch.float64)
    for _, logits in oracle_outputs.lines(1, head):
        for n in range(len(logits)):
            only = torch.arange(len(logits)) == n

            def loss(scales, logits=logits, only=only):
                """Squared change of the output, with the logit and the value of one entry scaled."""
                key, value = scales
                weights = torch.softmax(torch.where(only, logits * key, logits), 0)
                output = weights @ torch.where(only[:, None], head.values * value, head.values)
                return (output - torch.softmax(logits, 0) @ head.values).square().sum()

            step = -torch.tensor([prune != "value", prune != "key"], dtype=torch.float64)
            hessian = torch.autograd.functional.hessian(loss, torch.ones(2, dtype=torch.float64))
            expected[n] += float(step @ hessian @ step) / 2 / G
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("output", ["weighted", "mean"])
@pytest.mark.parametrize("base", ["value_norm", "key_norm", "random", "none"])
def test_output_error(window_view, output, base):
    """Against the output computed anew without the entry; a base below 0 is counted from its lowest."""
    view = window_view()
    scorer = make("output_error", base=make(base), output=output)
    got = scorer.score(view)
    assert (got[~view.valid] == 0).all()
    for b, h, slots, head in heads_of(view):
        wanted = oracle_outputs.output_error(scorer, head)
        torch.testing.assert_close(got[b, h, slots].double(), wanted, rtol=1e-4, atol=1e-6)
        assert (len(wanted.unique()) > 10) == (base != "none")


def test_output_error_where_one_entry_has_everything(make_view):
    """Nothing is left beside it, and nobody else is missed; no number overflows."""
    state = torch.zeros(1, 1, 5)
    state[..., 2] = 7.0
    view = make_view(shape=(1, 1, 5, 4), state={"accumulated_attention": state})
    for output in ("weighted", "mean"):
        got = make("output_error", output=output).score(view)[0, 0]
        assert got.isfinite().all()
        assert got[[0, 1, 3, 4]].tolist() == [0.0] * 4


@pytest.mark.parametrize("name", ["optimal_brain"])
def test_they_say_what_is_missing(make_view, name):
    with pytest.raises(UnsupportedError, match=f"{name} needs the last queries"):
        make(name).score(make_view())
