"""The strategies draw what they say, and what is hard on purpose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy.contracts.components import ImportanceScorer, SlotState
from kvpolicy.errors import UnsupportedError
from kvpolicy.testing import budgets, cache_views, components, policy_specs, scores
from kvpolicy.testing.cases import Case, Layer
from kvpolicy.testing.strategies import MAX_SLOTS
from kvpolicy.testing.tables import stand_in_tables
from kvpolicy.testing.tensors import HEAD_DIM

STATES = (SlotState("sum"), SlotState("stamp", torch.int32))
EVERYTHING = cache_views(needs={"queries", "rope"}, states=STATES, observe=3)
_EASY = settings(max_examples=2000, database=None, derandomize=True, phases=(Phase.generate,))


@given(EVERYTHING)
def test_views_are_what_the_contract_says(view):
    B, H, N = view.shape
    assert max(B, H) <= 3
    assert 1 <= N <= MAX_SLOTS
    assert view.keys.shape == view.values.shape == (B, H, N, HEAD_DIM)
    assert view.positions.dtype == view.rope_positions.dtype == torch.int32
    assert view.valid.any(-1).all()
    for tensor in (view.keys, view.values, view.state["sum"]):
        assert torch.isnan(tensor[~view.valid]).all()
        assert torch.isfinite(tensor[view.valid]).all()
    assert view.state["stamp"].dtype == torch.int32
    newest = view.positions.masked_fill(~view.valid, -1).amax(-1)
    assert (newest == view.seen[:, None] - 1).all()
    assert (view.prompt_length <= view.seen).all()
    for b in range(B):
        for h in range(H):
            at = view.positions[b, h, view.valid[b, h]]
            assert (at.diff() > 0).all()
            assert at[0] >= 0
    asked = view.query_positions.masked_fill(~view.query_valid, 0)
    assert (asked < view.seen[:, None]).all()
    assert torch.isfinite(view.queries[view.query_valid[:, None, None].expand(view.queries.shape[:4])]).all()


@pytest.mark.parametrize(
    "wanted",
    [
        lambda v: bool((v.keys[v.valid] == 0).all(-1).any()),
        lambda v: len(v.keys[v.valid].unique(dim=0)) < len(v.keys[v.valid]),
        lambda v: bool(v.valid[:, :, 1:].any() and not v.valid[:, :, 0].any()),
        lambda v: bool((v.valid[..., :-1] & ~v.valid[..., 1:]).any()),
        lambda v: len(set(v.valid.sum(-1).flatten().tolist())) > 2,
        lambda v: v.queries.shape[2] > 1 and v.shape[1] > 1,
        lambda v: not v.query_valid.all(),
        lambda v: bool((v.query_positions[:, 1:] < v.query_positions[:, :-1]).any()),
        lambda v: bool((v.positions[v.valid] != v.rope_positions[v.valid]).any()),
        lambda v: v.attention_sinks is not None and v.softcap is not None,
    ],
    ids=["zero", "equal", "pads", "tail or hole", "ragged", "gqa", "few queries", "ring", "turned", "sinks"],
)  # fmt: skip
def test_hard_cases_are_drawn(wanted):
    find(EVERYTHING, wanted, settings=_EASY)


def test_equal_scores_and_generous_budgets_are_drawn():
    find(scores(1, 2, 4), lambda x: x.unique().numel() == 1, settings=_EASY)
    find(scores(1, 2, 4), lambda x: x.unique().numel() == 8, settings=_EASY)
    find(budgets(), lambda n: n > MAX_SLOTS, settings=_EASY)


@given(st.data())
def test_components_are_drawn_within_their_bounds_and_with_defaults(data):
    for entry in kvpolicy.catalog().entries():
        assert isinstance(data.draw(components(entry.component)), entry.component)


def test_defaults_are_among_the_drawn_parameters():
    cls = kvpolicy.catalog().get("importance", "window_attention")
    find(components(cls), lambda made: made == cls(), settings=_EASY)
    find(components(cls), lambda made: made.group == "mean" and made.smooth_stage == "query", settings=_EASY)


def test_a_parameter_that_cannot_be_drawn_is_named():
    class Table(ImportanceScorer):
        path: bytes

        def score(self, view):
            raise NotImplementedError

    with pytest.raises(UnsupportedError, match=r"Table\.path: values of .* cannot be drawn"):
        components(Table)


def test_what_cannot_be_drawn_comes_from_examples():
    class Words(ImportanceScorer):
        words: bytes

        @classmethod
        def examples(cls):
            return [cls(words=b"a"), cls(words=b"b")]

        def score(self, view):
            raise NotImplementedError

    find(components(Words), lambda made: made.words == b"b", settings=_EASY)


def test_components_in_components_are_drawn():
    cls = kvpolicy.catalog().get("importance", "attention_memory")
    find(components(cls), lambda made: type(made.base).__name__ == "KeyNorm", settings=_EASY)


def test_what_needs_bring_is_drawn_and_moves_along():
    view = find(
        cache_views(needs={"query_statistics", "weights", "modality"}),
        lambda v: min(v.shape[:2]) > 1 and bool(v.extras["modality"].any() and v.extras["query_count"][1] > 0),
        settings=_EASY,
    )
    extras = view.extras
    assert torch.linalg.eigvalsh(extras["query_covariance"]).min() > -1e-4
    assert not (extras["modality"] & ~view.valid).any()
    rows, heads = Case((Layer(view),)).with_rows([1]).view, Case((Layer(view),)).with_heads([1, 0]).view
    for name in ("query_mean", "query_covariance", "modality"):
        assert torch.equal(rows.extras[name], extras[name][1:2])
        assert torch.equal(heads.extras[name][:, 0], extras[name][:, 1])
    assert torch.equal(heads.extras["output_projection"][1], extras["output_projection"][0])
    assert torch.equal(rows.extras["output_projection"], extras["output_projection"])


def test_a_need_that_there_is_not_is_named():
    with pytest.raises(UnsupportedError, match="needs: there is no logits; known are"):
        find(cache_views(needs={"logits"}), lambda v: True)


@given(policy_specs())
def test_drawn_policies_are_valid(spec):
    policy = spec.build()
    with stand_in_tables():
        assert kvpolicy.PolicySpec.from_yaml(spec.to_yaml()) == spec
    assert policy.budget.tokens is None or policy.reserved() <= policy.budget.tokens


@given(policy_specs(importance="key_norm", mixer="importance_only"))
def test_fields_of_drawn_policies_can_be_fixed(spec):
    assert spec.importance.use == "key_norm"
    assert spec.mixer.use == "importance_only"
