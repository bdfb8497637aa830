"""The same tokens on two processors: where only rounding tells entries apart, a decision goes by position."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy import PolicySpec
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView

ROWS, HEADS, SLOTS, DIM, TOKENS, LAYERS = 2, 2, 200, 16, 12, 2


def processor(number, tokens, plain):
    """The views of a cache whose keys and values hang on the token alone, as one processor rounds them."""
    generator = torch.Generator().manual_seed(100 + number)
    views = []
    for layer in range(LAYERS):
        keys, values = (
            (x[layer][:, tokens] * (1 + 2e-7 * torch.randn(HEADS, SLOTS, DIM, generator=generator).double())).float()
            for x in plain[:2]
        )
        views.append(
            CacheView(
                keys=keys.expand(ROWS, -1, -1, -1),
                values=values.expand(ROWS, -1, -1, -1),
                positions=torch.arange(SLOTS, dtype=torch.int32).expand(ROWS, HEADS, SLOTS),
                valid=torch.ones(ROWS, HEADS, SLOTS, dtype=torch.bool),
                scale=DIM**-0.5,
                layer_idx=layer,
                num_layers=LAYERS,
                prompt_length=torch.full((ROWS,), 40),
                seen=torch.full((ROWS,), SLOTS),
                compaction=torch.zeros(ROWS, dtype=torch.int64),
                budget=torch.full((ROWS,), 70),
                extras={"output_projection": plain[2]},
            )
        )
    return views


@pytest.fixture(scope="module")
def processors():
    """Three processors with the same text, of few different tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, TOKENS, (SLOTS,), generator=generator)
    plain = torch.randn(2, LAYERS, HEADS, TOKENS, DIM, generator=generator, dtype=torch.float64)
    projection = torch.randn(HEADS, 1, DIM, DIM, generator=generator)
    return [processor(number, tokens, (*plain, projection)) for number in range(3)]


def policy(**fields):
    plain = {
        "policy": "test",
        "budget": 70,
        "trigger": {"every": 8},
        "importance": "key_norm",
        "mixer": "importance_only",
    }
    return PolicySpec(**plain | fields).build()


BEST = {"use": "threshold", "value": 1.0, "relative_to": "max"}
MIXED = {"importance": "value_norm", "redundancy": {"use": "negative", "base": "key_norm"}}
COMPOSITIONS = {
    "key norms": {},
    "value norms": {"importance": "value_norm"},
    "weighted": {"importance": {"use": "value_weighted", "base": "value_norm"}},
    "a set for the layer": {"selector": {"use": "top_k", "scope": "layer"}},
    "a set for the model": {"selector": {"use": "top_k", "scope": "model", "reduce": "sum"}},
    "places": {**MIXED, "mixer": {"use": "rank", "weight": 0.3}},
    "standard scores": {**MIXED, "mixer": {"use": "z_score", "weight": 0.3}},
    "a first stage": {"importance": {"use": "critical", "base": "value_norm"}},
    "what the output loses": {"importance": {"use": "output_error", "base": "value_norm"}},
    "one after the other": {"importance": {"use": "greedy_values", "base": "value_norm", "step": 4}},
    "blocks by mass": {"importance": "value_norm", "mixer": {"use": "attention_mass", "mass": 0.2, "size": 4}},
    "large values": {"importance": "random", "protect": {"large_values": {"count": 40, "newest": 8}}},
    "ranks in a partition": {"importance": {"use": "lag_relative", "lag": 20, "sinks": 0}},
    "heads that compete": {"allocator": {"use": "adaptive_heads", "normalise": "z_score"}},
    "all heads that compete": {"allocator": {"use": "global_pool", "normalise": "z_score"}},
    "chunks": {"selector": {"use": "chunks", "size": 4}},
    "blocks for others": {"selector": {"use": "representatives", "size": 4, "share": 0.5}},
    "by lot, in proportion": {"importance": "value_norm", "selector": {"use": "stochastic", "in_proportion": True}},
    "a share of every chunk": {"selector": {"use": "per_chunk_quota", "size": 16}},
    "regions": {"selector": "region_quota"},
    "as much as the best": {"importance": "value_norm", "selector": BEST},
    "by lot": {"selector": {"use": "stochastic", "temperature": 0.01}},
    "density": {"redundancy": {"use": "key_density", "rope": "post"}, "mixer": {"use": "linear", "weight": 0.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_processors_keep_the_same(name, processors):
    composed = policy(**COMPOSITIONS[name])
    first, *others = (composed.select(views, [70] * ROWS) for views in processors)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one.lengths, two.lengths)
            assert torch.equal(one.mask(SLOTS), two.mask(SLOTS))


def test_the_oldest_of_equal_tokens_stay(processors):
    """Positions decide, not which of them rounding made a little shorter."""
    composed = policy()
    for views in processors:
        decision = composed.decide(views, [70] * ROWS)
        for scores, keep in zip(decision.shared.scores, decision.kept, strict=True):
            assert all(len(row.unique()) == TOKENS for row in scores.flatten(0, 1))
            kept = keep.mask(SLOTS).flatten(0, 1)
            for row, stays in zip(scores.flatten(0, 1), kept, strict=True):
                for value in row.unique():
                    among = stays[row == value]
                    assert bool(among[: int(among.sum())].all())


class Age(ImportanceScorer):
    """Positions beyond those that rounding would tell apart."""

    rounded = False

    def score(self, view):
        return view.positions.float() + 2**23


@pytest.mark.parametrize("name", ["recency", "random", "last_used"])
def test_bundled_scorers_whose_differences_all_count(name):
    assert not kvpolicy.catalog().get("importance", name).rounded
    assert kvpolicy.catalog().get("importance", "key_norm").rounded


def test_scores_that_are_not_rounded_are_not_levelled(processors):
    composed = replace(policy(), importance=Age())
    for keep in composed.select(processors[0], [70] * ROWS):
        assert (keep.indices == torch.arange(SLOTS - 70, SLOTS)).all()
