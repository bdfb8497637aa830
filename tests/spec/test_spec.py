"""Specifications: forms, defaults, round trips, and what Python may write."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import ComponentRef, PolicySpec, SpecError
from kvpolicy.contracts.budget import Budget
from kvpolicy.odd_text import odd_character
from kvpolicy.spec import yaml_text
from kvsupport.spec_shapes import RKV, SHORT


def test_the_file_of_the_design(rkv):
    policy = rkv.build()
    assert (policy.name, policy.budget.tokens, policy.phase, policy.paper) == (
        "my-rkv",
        1024,
        "decode",
        "arXiv:2505.24133",
    )
    assert policy.trigger.interval == 128
    assert [type(p).__name__ for p in policy.protections] == ["Sinks", "Recent"]
    assert [p.count for p in policy.protections] == [4, 8]
    assert (policy.importance.observe, policy.importance.smooth) == (8, 7)
    assert (policy.redundancy.threshold, policy.redundancy.beta) == (0.5, 1)
    assert policy.mixer.weight == 0.1
    assert policy.selector.scope == "head"


def test_round_trip(rkv):
    again = PolicySpec.from_yaml(rkv.to_yaml())
    assert again == rkv
    assert hash(again) == hash(rkv)
    assert "extends" not in rkv.to_yaml()
    assert again.build() == rkv.build()


@pytest.mark.parametrize("name", [e.name for e in kvpolicy.catalog().policies()])
def test_registered_policies_round_trip_in_every_form(name):
    spec = kvpolicy.load(name)
    assert spec.policy == name
    assert PolicySpec.from_yaml(spec.to_yaml()) == spec
    assert PolicySpec(**spec.to_data()) == spec
    assert PolicySpec.model_validate(spec.model_dump()) == spec
    assert PolicySpec.model_validate_json(spec.model_dump_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert spec.build().name == name


def test_defaults():
    spec = PolicySpec.from_yaml(SHORT)
    assert spec.redundancy.use == "none"
    assert spec.mixer.use == "importance_only"
    assert spec.allocator.use == "uniform"
    assert spec.selector == ComponentRef("top_k", spec.selector.component)
    assert (spec.phase, spec.protect, spec.post, spec.backend, spec.prefill_chunk) == ("decode", (), (), "auto", None)


def test_the_same_policy_written_in_other_ways_is_equal():
    long = SHORT.replace("each_step", "{use: each_step}").replace("key_norm", "{use: key_norm}")
    long = long.replace("{tokens: 64}", "64") + "redundancy: none\nphase: decode\nprotect: {recent: false}\npost: []\n"
    assert PolicySpec.from_yaml(long) == PolicySpec.from_yaml(SHORT)


@pytest.mark.parametrize(
    "trigger",
    ["{every: 64}", "{every: {interval: 64}}", "{use: every, interval: 64}", "{every: {interval: 64, align: 1}}"],
)
def test_forms_of_a_trigger(trigger):
    spec = PolicySpec.from_yaml(SHORT.replace("each_step", trigger))
    assert spec.trigger.data == {"use": "every", "interval": 64, "align": 1}


def test_trigger_by_name_has_its_defaults():
    assert PolicySpec.from_yaml(SHORT.replace("each_step", "{every: true}")).trigger.params["interval"] == 128
    assert PolicySpec.from_yaml(SHORT.replace("each_step", "every")).trigger.params["interval"] == 128


@pytest.mark.parametrize("recent", ["8", "{count: 8}"])
def test_forms_of_a_protection(recent):
    spec = PolicySpec.from_yaml(SHORT + f"protect: {{sinks: true, prompt: true, recent: {recent}}}\n")
    assert [(ref.use, ref.params) for ref in spec.protect] == [
        ("sinks", {"count": 4}),
        ("prompt", {}),
        ("recent", {"count": 8}),
    ]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("{tokens: 5}", Budget(tokens=5)),
        ("5", Budget(tokens=5)),
        ("{fraction: 0.25}", Budget(fraction=0.25)),
        ("0.25", Budget(fraction=0.25)),
        ("1.0", Budget(fraction=1.0)),
        ("{fraction: 1}", Budget(fraction=1.0)),
        ("1", Budget(tokens=1)),
        ("1e-3", Budget(fraction=0.001)),
    ],
)
def test_forms_of_a_budget(budget, expected):
    assert PolicySpec.from_yaml(SHORT.replace("{tokens: 64}", budget)).budget == expected


def test_numbers_and_words_are_those_of_yaml_1_2():
    text = """
a: [1e-6, 1.5E+3, .5, 12., -3, 0x1F, 0o17, 012, .inf, -.INF, +1]
b: [no, yes, on, 1_000, 12:30, 2025-01-01, "1e-6", e5, 1e, ".", "~"]
c: [true, False, null, ~, ]
d:
"""
    data = yaml_text.parse(text, "t").data
    inf = float("inf")
    assert data["a"] == [1e-6, 1500.0, 0.5, 12.0, -3, 31, 15, 12, inf, -inf, 1]
    assert [type(v) for v in data["a"]] == [float, float, float, float, int, int, int, int, float, float, int]
    assert data["b"] == ["no", "yes", "on", "1_000", "12:30", "2025-01-01", "1e-6", "e5", "1e", ".", "~"]
    assert data["c"] == [True, False, None, None]
    assert data["d"] is None


def test_marks_point_at_keys():
    marks = yaml_text.parse("a: 1\nb:\n  c: [x,\n    y]\n", "t").marks
    assert {path: (m.line, m.column) for path, m in marks.items()} == {
        (): (1, 1),
        ("a",): (1, 1),
        ("b",): (2, 1),
        ("b", "c"): (3, 3),
        ("b", "c", 0): (3, 7),
        ("b", "c", 1): (4, 5),
    }


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
_SHOWN = _TEXT.filter(lambda text: odd_character(text) is None)  # what a policy may say
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), _VALUES, min_size=1, max_size=4))
def test_what_is_written_is_read_back(data):
    read = yaml_text.parse(yaml_text.write(data), "t").data
    assert read == data
    assert repr(read) == repr(data)  # also 1 against 1.0 against true


@given(
    description=_SHOWN,
    departures=st.lists(_SHOWN, max_size=3),
    weight=st.floats(0, 1),
    threshold=st.floats(0, 1),
    observe=st.integers(1, 10**6),
    budget=st.integers(12, 10**9) | st.floats(0, 1, exclude_min=True),
    chunk=st.none() | st.integers(1, 10**6),
    phase=st.sampled_from(["prefill", "decode", "both"]),
)
def test_any_specification_round_trips(description, departures, weight, threshold, observe, budget, chunk, phase):
    spec = kvpolicy.load(
        "rkv",
        budget,
        description=description,
        departures=departures,
        mixer__weight=weight,
        redundancy__threshold=threshold,
        importance__observe=observe,
        prefill_chunk=chunk,
        phase=phase,
    )
    again = PolicySpec.from_yaml(spec.to_yaml())
    assert again == spec
    assert again.mixer.params["weight"] == weight
    assert again.departures == tuple(departures)


# -- Python ---------------------------------------------------------------------------------------------------------


def test_python_takes_names_mappings_and_components(rkv):
    linear = kvpolicy.catalog().get("mixer", "linear")
    recent = kvpolicy.catalog().get("protection", "recent")
    spec = PolicySpec(
        policy="mine",
        budget=64,
        trigger={"every": 16},
        protect=[recent(count=3)],
        importance="key_norm",
        redundancy=rkv.redundancy,
        mixer=linear(weight=0.7),
        post=["rerotate"],
    )
    assert spec.mixer.data == {"use": "linear", "weight": 0.7}
    assert spec.redundancy == rkv.redundancy
    assert [ref.data for ref in spec.protect] == [{"use": "recent", "count": 3}]
    assert spec.build().post[0].changes == "positions"
    assert PolicySpec.from_yaml(spec.to_yaml()) == spec


def test_it_is_frozen_and_hashable(rkv):
    with pytest.raises(ValueError, match="frozen"):
        rkv.phase = "both"
    assert len({rkv, PolicySpec.from_yaml(RKV), rkv.replace("phase", "both")}) == 2


def test_params_are_copies(rkv):
    rkv.mixer.params["weight"] = 1
    rkv.to_data()["mixer"]["weight"] = 1
    assert rkv.mixer.params == {"weight": 0.1}


def test_model_copy_is_checked(rkv):
    assert rkv.model_copy() == rkv
    assert rkv.model_copy(update={"budget": 99}).build().budget.tokens == 99
    with pytest.raises(SpecError, match=r"budget\.tokens: 0"):
        rkv.model_copy(update={"budget": 0})


def test_a_scorer_without_effect_is_refused(rkv):
    text = "schema_version: 1\npolicy: p\nbudget: 64\ntrigger: each_step\nimportance: key_norm\n"
    text += "redundancy: key_cosine\nmixer: importance_only\n"
    said = r"<text>:6:\d+: redundancy: 'key_cosine' has no effect, .* write `redundancy: none` or a mixer that uses it"
    with pytest.raises(SpecError, match=said):
        PolicySpec.from_yaml(text)
    with pytest.raises(SpecError, match="redundancy: 'key_cosine' has no effect"):
        rkv.replace("mixer", "importance_only")
    assert rkv.replace({"redundancy": "none", "mixer": "importance_only"}).build().mixer.uses_importance


@pytest.mark.parametrize(
    ("path", "value", "field", "expected"),
    [
        ("mixer.weight", 0.3, "mixer", {"use": "linear", "weight": 0.3}),
        ("mixer", "rank", "mixer", {"use": "rank", "weight": 0.5}),
        ("budget", 300, "budget", {"tokens": 300}),
        ("budget.tokens", 300, "budget", {"tokens": 300}),
        ("budget.fraction", 0.5, "budget", {"fraction": 0.5}),
        ("phase", "both", "phase", "both"),
        ("prefill_chunk", 32, "prefill_chunk", 32),
        ("trigger.every", 64, "trigger", {"use": "every", "interval": 64, "align": 1}),
        ("trigger.interval", 64, "trigger", {"use": "every", "interval": 64, "align": 1}),
        ("trigger.use", "each_step", "trigger", {"use": "each_step"}),
        ("importance.use", "key_norm", "importance", {"use": "key_norm"}),
        ("protect.recent", False, "protect", {"sinks": {"count": 4}}),
        ("protect.recent", 16, "protect", {"sinks": {"count": 4}, "recent": {"count": 16}}),
        ("protect.recent.count", 16, "protect", {"sinks": {"count": 4}, "recent": {"count": 16}}),
        ("protect.prompt", True, "protect", {"sinks": {"count": 4}, "recent": {"count": 8}, "prompt": {}}),
        ("protect", {"recent": 1}, "protect", {"recent": {"count": 1}}),
        ("post", ["rerotate"], "post", [{"use": "rerotate"}]),
    ],
)
def test_replace(rkv, path, value, field, expected):
    before = rkv.to_data()
    changed = rkv.replace(path, value)
    assert changed.to_data() == {**before, field: expected}
    assert rkv.to_data() == before
    assert PolicySpec.from_yaml(changed.to_yaml()) == changed


def test_replacing_a_whole_component_starts_from_its_defaults(rkv):
    wide = rkv.replace("importance.observe", 32)
    assert wide.replace("importance", "window_attention").importance.params["observe"] == 8
    assert wide.replace("importance.use", "window_attention").importance.params["observe"] == 32


def test_replace_several_at_once_is_checked_once(rkv):
    # Neither change alone is valid.
    both = {"protect.recent": 100, "budget": 104}
    assert rkv.replace(both).build().reserved() == 104
    with pytest.raises(SpecError):
        rkv.replace("protect.recent", 2000)
    assert rkv.replace({"protect.recent": 2000, "budget": 3000}).budget.tokens == 3000
    assert rkv.replace({"importance.use": "random", "importance.seed": 5}).importance.params == {"seed": 5}


def test_load_takes_budget_and_overrides():
    spec = kvpolicy.load("rkv", budget=512, mixer__weight=0.3, protect__recent__count=9, phase="both")
    assert spec == kvpolicy.load("rkv").replace(
        {"budget.tokens": 512, "mixer.weight": 0.3, "protect.recent": 9, "phase": "both"}
    )
    assert kvpolicy.load("rkv", 0.1).budget == Budget(fraction=0.1)
    assert kvpolicy.load("rkv", {"fraction": 1}).budget == Budget(fraction=1.0)
    assert kvpolicy.load("rkv", Budget(tokens=77)).budget == Budget(tokens=77)


# -- files ----------------------------------------------------------------------------------------------------------


# -- third parties --------------------------------------------------------------------------------------------------
