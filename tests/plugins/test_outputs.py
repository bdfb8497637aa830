"""Scorers that ask what the attention's output loses with an entry, against the papers' formulas in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy.errors import SpecError, UnsupportedError
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
SCORERS += [
    ("worst_case", {"observe": observe, "smooth": smooth, "prior": prior})
    for observe, smooth, prior in ((1, 1, 0.0), (4, 5, 1.0), (16, 2, 1.0), (4, 1, 0.5))
]
SCORERS += [
    ("value_capacity", {"observe": observe, "sharpness": sharp}) for observe, sharp in ((1, 5.0), (4, 0.0), (9, 2.0))
]
SCORERS += [
    ("beacon_attention", {"observe": observe, "beacons": beacons, "over": over})
    for observe, beacons, over in ((6, 2, "max"), (6, 3, "mean"), (4, 9, "mean"), (1, 1, "max"), (6, 9, "max"))
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
        assert len(wanted.unique()) > (1 if name == "worst_case" else 10)


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


@pytest.mark.parametrize("base", ["worst_case", "key_norm"])
def test_output_weighted(window_view, base):
    generator = torch.Generator().manual_seed(21)
    view = window_view(extras={"output_projection": torch.randn(H, G, D, 24, generator=generator)})
    scorer = make("output_weighted", base=make(base))
    got = scorer.score(view)
    for b, h, slots, head in heads_of(view):
        wanted = oracle_outputs.output_weighted(scorer, head)
        torch.testing.assert_close(got[b, h, slots].double(), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedError, match="output_weighted needs the output projection"):
        scorer.score(replace(view, extras={}))


def test_output_weighted_is_as_comparable_as_its_base():
    """AdaKV pools its scores over the heads of a layer where the base allows it, and is refused where not."""
    spec = kvpolicy.load("defensivekv")
    assert spec.build().counts == "per_head"
    with pytest.raises(SpecError, match="not comparable across heads"):
        spec.replace("importance.base", "key_norm").build()


@pytest.mark.parametrize("step", [1, 3, 50])
@pytest.mark.parametrize(
    ("base", "weight"), [("window_attention", 0.5), ("value_norm", 2.0), ("none", 1.0), ("random", 0.0)]
)
def test_greedy_values(window_view, base, weight, step):
    view = window_view()
    scorer = make("greedy_values", base=make(base), weight=weight, step=step)
    got = scorer.score(view)
    assert (got[~view.valid] == 0).all()
    for b, h, slots, head in heads_of(view):
        wanted = oracle_outputs.greedy_values(scorer, head)
        # Numbers of turns say who goes before whom, from any number on.
        assert got[b, h, slots].argsort().tolist() == wanted.argsort().tolist()


def test_greedy_values_spare_one_of_each_kind(make_view):
    """Ten entries with one value and two with others: the first three taken are of three kinds."""
    values = torch.eye(4)[[0] * 5 + [1] + [0] * 5 + [2]].expand(1, 1, 12, 4)
    view = make_view(shape=(1, 1, 12, 4), values=values)
    scorer = make("greedy_values", base=make("none"), weight=1.0, step=1)
    assert scorer.score(view)[0, 0].topk(3).indices.tolist() == [0, 5, 11]


@pytest.mark.parametrize("name", ["optimal_brain", "worst_case", "value_capacity", "beacon_attention"])
def test_they_say_what_is_missing(make_view, name):
    with pytest.raises(UnsupportedError, match=f"{name} needs the last queries"):
        make(name).score(make_view())
