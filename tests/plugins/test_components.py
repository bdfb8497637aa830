"""Every bundled component: what it computes, what it ignores, and how it is declared."""

from __future__ import annotations

import inspect
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import kvpolicy
import kvpolicy_plugins
from kvpolicy import PolicySpec, ops
from kvpolicy.contracts.component import descriptions
from kvpolicy.contracts.components import KINDS, NEEDS
from kvpolicy.errors import UnsupportedError
from kvpolicy.loading import installed
from kvpolicy.testing import check_component
from kvpolicy.testing.checking import subjects_of_package
from kvpolicy.testing.tables import stand_in_tables, table_fields

BUNDLED = [
    (entry.kind, entry.name)
    for entry in kvpolicy.catalog().entries()
    if entry.origin.plugin == "builtin-plugins" and entry.name != "kvpress"  # tests/bridges: it needs a press
]


def make(kind, name, **params):
    component = kvpolicy.catalog().get(kind, name)
    return component(**dict.fromkeys(table_fields(component), "stand-in/one"), **params)


@pytest.fixture(autouse=True)
def _tables_of_any_model():
    with stand_in_tables():
        yield


SCORERS = [
    *((kind, name, {}) for kind, name in BUNDLED if kind in ("importance", "redundancy")),
    (
        "importance",
        "window_attention",
        {"observe": 3, "group": "mean", "group_stage": "weights", "softmax_over": "row"},
    ),
    ("importance", "window_attention", {"smooth": 6, "smooth_stage": "query", "smooth_kind": "mean"}),
    ("importance", "attention_memory", {"smooth": 3, "combine": "mean"}),
    ("redundancy", "mean_key", {"unit_mean": True, "by_modality": True}),
    ("redundancy", "key_cosine", {"beta": 2, "spare": "own", "window": 3}),
    ("redundancy", "key_cosine", {"index_zero": True, "rope": "pre", "threshold": 0.8}),
]


@pytest.mark.parametrize(("kind", "name", "params"), SCORERS)
def test_a_view_without_what_a_scorer_reads_is_refused_with_what_to_give(make_view, kind, name, params):
    scorer = make(kind, name, **params)
    bare = replace(make_view(), rope=None)
    if not any(each.needs or each.observed_queries() or each.slot_state() for each in scorer.members()):
        assert torch.isfinite(scorer.score(bare)).all()
        return
    with pytest.raises(UnsupportedError, match=r"needs .* holds none;.* give CacheView `\w+`"):
        scorer.score(bare)


def test_every_module_of_a_component_is_registered():
    root = Path(kvpolicy_plugins.__file__).parent
    modules = {f"{path.parent.name}.{path.stem}" for path in root.glob("*/*.py") if not path.stem.startswith("_")}
    listed = [line.partition(":")[0] for line in kvpolicy_plugins.COMPONENTS]
    assert modules - {"importance.kvpress"} == set(listed)
    assert listed == sorted(listed)
    assert len(BUNDLED) == len(listed)
    assert {kind for kind, _ in BUNDLED} == set(KINDS)


def test_a_scorer_takes_its_module_and_one_line(monkeypatch):
    module = types.ModuleType("kvpolicy_plugins.importance.loudest")

    class Loudest(kvpolicy.ImportanceScorer):
        """The largest number in a value."""

        def score(self, view):
            return view.values.float().abs().amax(-1).masked_fill(~view.valid, 0.0)

    module.Loudest = Loudest
    monkeypatch.setitem(sys.modules, module.__name__, module)
    line = "importance.loudest:Loudest"
    monkeypatch.setattr(kvpolicy_plugins, "COMPONENTS", (*kvpolicy_plugins.COMPONENTS, line))
    with installed.using(installed.load_catalog()) as catalog:
        assert not catalog.failures
        assert catalog.entry("importance", "loudest").origin.plugin == "builtin-plugins"
        policy = kvpolicy.load("random", budget=16).replace("importance", "loudest")
        assert PolicySpec.from_yaml(policy.to_yaml()) == policy
        assert "loudest" in json.dumps(kvpolicy.json_schema())
        assert "importance.loudest" in {subject.name for subject in subjects_of_package("kvpolicy")}
        assert [r for r in check_component(Loudest) if r.status not in ("passed", "not applicable")] == []


@pytest.mark.parametrize(("kind", "name"), BUNDLED)
def test_declaration(kind, name):
    component = kvpolicy.catalog().get(kind, name)
    assert inspect.getdoc(component)
    for parameter, description in descriptions(component).items():
        assert description or kind == "selector", f"{name}.{parameter} has no docstring"
    made, again = make(kind, name), make(kind, name)
    with pytest.raises(ValidationError, match="no_such_parameter"):
        make(kind, name, no_such_parameter=1)
    assert made == again
    assert hash(made) == hash(again)
    assert made.needs <= set(NEEDS)
    source = Path(inspect.getsourcefile(component))
    assert len(source.read_text(encoding="utf-8").splitlines()) < 100


@pytest.mark.parametrize(
    ("kind", "name", "params"),
    [
        ("importance", "window_attention", {"observe": 0}),
        ("importance", "window_attention", {"observe": True}),
        ("importance", "window_attention", {"smooth": 0}),
        ("importance", "window_attention", {"group": "sum"}),
        ("importance", "random", {"seed": -1}),
        ("importance", "attention_memory", {"decay": 1.1}),
        ("importance", "attention_memory", {"base": 3}),
        ("importance", "recurrence", {"threshold": 2.0}),
        ("importance", "last_used", {"share": 0.0}),
        ("importance", "decayed_attention", {"decay": -0.1}),
        ("importance", "critical", {"first_share": 1.5}),
        ("redundancy", "key_cosine", {"threshold": 1.5}),
        ("redundancy", "key_cosine", {"threshold": float("nan")}),
        ("redundancy", "key_cosine", {"beta": -1}),
        ("redundancy", "key_cosine", {"window": -1}),
        ("mixer", "linear", {"weight": 1.1}),
        ("mixer", "linear", {"weight": "0.1"}),
        ("mixer", "head_adaptive", {"window": -1}),
        ("protection", "sinks", {"count": -1}),
        ("protection", "recent", {"count": 1.0}),
        ("allocator", "pyramid", {"beta": 0.9}),
        ("allocator", "adaptive_heads", {"floor": -0.1}),
        ("allocator", "global_pool", {"normalise": "rank"}),
        ("selector", "chunks", {"size": 0}),
        ("selector", "region_quota", {"floor": 1.1}),
        ("selector", "region_quota", {"regions": 0}),
        ("selector", "stochastic", {"temperature": 0.0}),
        ("selector", "stochastic", {"sampled": 1.5}),
        ("selector", "threshold", {"value": float("nan")}),
        ("post", "merge_values", {"threshold": -0.5}),
        ("post", "prune_channels", {"ratio": 1.0}),
        ("trigger", "every", {"interval": 0}),
        ("trigger", "every", {"align": 0}),
    ],
)
def test_parameters_are_checked(kind, name, params):
    with pytest.raises(ValidationError):
        make(kind, name, **params)


def full_view(make_view, scorer, **fields):
    """A view with everything that a scorer may ask for."""
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(2, 2, 2, 8, 8, generator=generator)
    states = [state for member in scorer.members() for state in member.slot_state()]
    state = {s.name: (9 * torch.rand(2, 2, 40, generator=generator)).to(s.dtype) for s in states}
    extras = {
        "output_projection": torch.randn(2, 2, 8, 16, generator=generator),
        "modality": torch.rand(2, 2, 40, generator=generator) < 0.5,
        "query_mean": torch.randn(2, 2, 2, 8, generator=generator),
        "query_covariance": torch.eye(8).expand(2, 2, 2, 8, 8),
    }
    budget = torch.tensor([12, 20])
    return make_view(shape=(2, 2, 40, 8), queries=queries, state=state, extras=extras, budget=budget, **fields)


@pytest.mark.parametrize(("kind", "name", "params"), SCORERS)
def test_scores_ignore_what_is_not_valid(make_view, kind, name, params):
    """fp32, finite, nothing written; poison in an invalid slot changes no other slot."""
    scorer = make(kind, name, **params)
    view = full_view(make_view, scorer)
    valid = view.valid.clone()
    valid[0, :, :6], valid[1, :, 30:] = False, False
    clean = replace(view, valid=valid)
    before = view.keys.clone()
    scores = scorer.score(clean)
    assert scores.shape == view.shape
    assert scores.dtype == torch.float32
    assert scores[valid].isfinite().all()
    assert torch.equal(view.keys, before)
    bad = ~valid[..., None]
    poisoned = replace(
        clean,
        keys=view.keys.masked_fill(bad, float("nan")),
        values=view.values.masked_fill(bad, float("inf")),
        positions=view.positions.masked_fill(~valid, -(2**31)),
        state={
            name: t.masked_fill(~valid, float("nan") if t.is_floating_point() else 2**31 - 1)
            for name, t in view.state.items()
        },
    )
    torch.testing.assert_close(scorer.score(poisoned)[valid], scores[valid], atol=0, rtol=0)


@pytest.mark.parametrize("field", ["keys", "values", "queries"])
@pytest.mark.parametrize(
    ("kind", "name", "params"),
    [
        *SCORERS,
        ("importance", "lag_relative", {"lag": 8, "sinks": 2}),
        ("mixer", "attention_mass", {"mass": 0.3, "size": 4}),
        *((kind, name, {}) for kind, name in BUNDLED if kind == "mixer"),
    ],
)
def test_what_is_read_and_is_no_number_makes_scores_that_are_none(make_view, kind, name, params, field):
    """Ranks, turns and comparisons would hide it, and entries would stay or go by chance."""
    made = make(kind, name, **params)
    view = full_view(make_view, made)
    states = [state for member in made.members() for state in member.slot_state()]
    view = replace(view, state={s.name: torch.full_like(view.state[s.name], s.fill) for s in states})
    mixed = torch.rand(2, 2, 2, 40, generator=torch.Generator().manual_seed(4))

    def scores(number=None):
        changed = getattr(view, field).clone()
        if number is not None:
            changed[(0, 1, 0, 5) if field == "queries" else (0, 1, 21)] = number
        given = replace(view, **{field: changed})
        return made.mix(*mixed, given) if kind == "mixer" else made.score(given)

    if not torch.equal(scores(-7.0), scores()) or not torch.equal(scores(9.0), scores()):
        assert not scores(float("nan"))[0, 1].isfinite().all()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", [name for kind, name in BUNDLED if kind == "mixer"])
def test_a_mixer_shows_that_a_score_is_no_number(make_view, name, which):
    mixer = make("mixer", name)
    view = full_view(make_view, mixer)
    given = torch.rand(2, 2, 2, 40, generator=torch.Generator().manual_seed(4))
    given[which, 0, 1, 17] = float("nan")
    shown = not mixer.mix(*given, view)[0, 1].isfinite().all()
    assert shown == (mixer.uses_importance, mixer.uses_redundancy)[which]


@pytest.mark.parametrize(("kind", "name", "params"), SCORERS)
def test_scores_of_a_float64_cache_are_fp32_and_nearly_those_of_an_fp32_one(make_view, kind, name, params):
    scorer = make(kind, name, **params)
    view = full_view(make_view, scorer)
    double = replace(
        view,
        **{field: getattr(view, field).double() for field in ("keys", "values", "queries")},
        extras={name: t.double() if name == "output_projection" else t for name, t in view.extras.items()},
    )
    scores = scorer.score(double)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, scorer.score(view), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "name", "params"), SCORERS)
def test_a_row_of_a_batch_scores_as_alone(make_view, kind, name, params):
    scorer = make(kind, name, **params)
    view = full_view(make_view, scorer, compaction=torch.tensor([0, 3]), prompt_length=torch.tensor([5, 9]))
    together = scorer.score(view)
    for b in range(2):
        row = slice(b, b + 1)
        single = replace(
            view,
            **{
                name: getattr(view, name)[row]
                for name in (
                    "keys", "values", "positions", "valid", "queries", "query_positions", "query_valid",
                    "prompt_length", "seen", "compaction", "budget",
                )
            },
            state={name: t[row] for name, t in view.state.items()},
            extras={name: t if name == "output_projection" else t[row] for name, t in view.extras.items()},
        )  # fmt: skip
        torch.testing.assert_close(scorer.score(single), together[row], atol=1e-6, rtol=0)


def test_window_attention_looks_at_its_own_number_of_queries(make_view):
    """Another component may have asked for more queries; their order does not matter."""
    queries = torch.randn(1, 2, 2, 6, 8)
    view = make_view(shape=(1, 2, 20, 8), queries=queries)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    mixed = replace(view, queries=queries[:, :, :, order], query_positions=view.query_positions[:, order])
    scorer = make("importance", "window_attention", observe=4)
    assert scorer.observed_queries() == 4
    last = replace(
        view,
        queries=queries[:, :, :, 2:],
        query_positions=view.query_positions[:, 2:],
        query_valid=view.query_valid[:, 2:],
    )
    torch.testing.assert_close(scorer.score(mixed), scorer.score(last), atol=1e-7, rtol=0)
    few = replace(view, query_valid=view.query_positions >= 18)
    two = make("importance", "window_attention", observe=2)
    torch.testing.assert_close(scorer.score(few), two.score(view), atol=1e-7, rtol=0)
    with pytest.raises(UnsupportedError, match="needs the last queries"):
        scorer.score(replace(view, queries=None))


def test_window_attention_honours_the_model(make_view):
    queries = torch.randn(1, 2, 2, 4, 8)
    sinks = torch.randn(2, 2)
    view = make_view(shape=(1, 2, 20, 8), queries=queries, scale=0.7, softcap=3.0, attention_sinks=sinks)
    expected = ops.window_importance(
        queries, view.query_positions, view.query_valid, view.keys, view.positions, view.valid,
        scale=0.7, softcap=3.0, attention_sinks=sinks,
    )  # fmt: skip
    assert torch.equal(make("importance", "window_attention").score(view), expected)


def test_golden_g5_accumulated_attention(make_view):
    """H2O by hand: one head, two entries kept of three, then one more step."""
    scorer = make("importance", "accumulated_attention")
    (state,) = scorer.slot_state()
    assert (state.name, state.dtype, state.fill) == ("accumulated_attention", torch.float32, 0.0)
    assert scorer.needs == {"attention"}

    def observe(sums, rows):
        view = make_view(shape=(1, 1, len(sums), 4), state={state.name: torch.tensor([[sums]])})
        weights = torch.tensor(rows)[None, None, None]
        return scorer.observe_attention(view, weights)[state.name][0, 0]

    prefill = observe([0.0, 0.0, 0.0], [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.5, 0.3]])
    torch.testing.assert_close(prefill, torch.tensor([1.7, 1.0, 0.3]))
    step = observe([1.7, 0.3, state.fill], [[0.1, 0.6, 0.3]])
    torch.testing.assert_close(step, torch.tensor([1.8, 0.9, 0.3]))
    other = observe([0.0, 0.0, 0.0], [[1.0, 0.0, 0.0], [0.3, 0.7, 0.0], [0.2, 0.7, 0.1]])
    torch.testing.assert_close(other, torch.tensor([1.5, 1.4, 0.1]))


def test_accumulated_attention_sums_over_the_group(make_view):
    weights = torch.rand(2, 2, 3, 5, 20)
    view = make_view(state={"accumulated_attention": torch.ones(2, 2, 20)})
    state = make("importance", "accumulated_attention").observe_attention(view, weights)["accumulated_attention"]
    torch.testing.assert_close(state, 1 + weights.sum((2, 3)))


def test_norms(make_view):
    view = make_view()
    torch.testing.assert_close(make("importance", "key_norm").score(view), -view.keys.norm(dim=-1))
    torch.testing.assert_close(make("importance", "value_norm").score(view), view.values.norm(dim=-1))
    large = replace(view, keys=torch.full_like(view.keys, 60000).half())
    assert make("importance", "key_norm").score(large).isfinite().all()


def test_recency_and_none(make_view):
    view = make_view(positions=torch.arange(7, 47, 2, dtype=torch.int32).expand(2, 2, 20))
    assert make("importance", "recency").score(view)[0, 0, :3].tolist() == [7, 9, 11]
    for kind in ("importance", "redundancy"):
        assert (make(kind, "none").score(view) == 0).all()


def test_random_depends_on_place_not_on_the_batch(make_view):
    view = make_view(compaction=torch.tensor([0, 1]))
    scores = make("importance", "random").score(view)
    assert (scores[0] != scores[1]).any(), "another compaction draws anew"
    assert (scores[0, 0] != scores[0, 1]).any(), "so does another head"
    assert (make("importance", "random", seed=1).score(view) != scores).any()
    assert (make("importance", "random").score(replace(view, layer_idx=1)) != scores).any()
    moved = replace(view, positions=view.positions[..., 5:], valid=view.valid[..., 5:], keys=view.keys[:, :, 5:])
    assert torch.equal(make("importance", "random").score(moved), scores[..., 5:])


def test_key_cosine_window_and_rope(make_view):
    view = make_view(shape=(1, 2, 30, 8))
    score = make("redundancy", "key_cosine", window=8).score(view)
    assert (score[..., 22:] == 0).all()
    inner = ops.redundancy(view.keys[:, :, :22], view.valid[..., :22])
    torch.testing.assert_close(score[..., :22], inner, atol=1e-7, rtol=0)

    pre = make("redundancy", "key_cosine", rope="pre")
    assert pre.needs == {"rope"}
    assert make("redundancy", "key_cosine").needs == frozenset()
    rotated = replace(view, keys=ops.rotate(view.keys, view.rope, view.positions), rope_positions=view.positions)
    bare = make("redundancy", "key_cosine").score(view)
    torch.testing.assert_close(pre.score(rotated), bare, atol=1e-6, rtol=0)
    torch.testing.assert_close(pre.score(replace(rotated, rope_positions=None)), bare, atol=1e-6, rtol=0)
    elsewhere = replace(
        rotated, keys=ops.rotate(view.keys, view.rope, torch.tensor(3)), rope_positions=view.positions * 0 + 3
    )
    torch.testing.assert_close(pre.score(elsewhere), bare, atol=1e-6, rtol=0)
    with pytest.raises(UnsupportedError, match="needs the rotary embedding"):
        pre.score(replace(view, rope=None))


def test_mixers(make_view):
    view = make_view()
    importance, redundancy = torch.rand(2, 2, 20), torch.rand(2, 2, 20)
    for weight in (0.0, 0.1, 1.0):
        mixed = make("mixer", "linear", weight=weight).mix(importance, redundancy, view)
        torch.testing.assert_close(mixed, weight * importance - (1 - weight) * redundancy)
    alone = make("mixer", "importance_only")
    assert not alone.uses_redundancy
    assert torch.equal(alone.mix(importance, redundancy, view), importance)
