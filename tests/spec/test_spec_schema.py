"""The JSON schema says the same as the loader, as far as a schema can."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict, Field

import kvpolicy
from kvpolicy import ImportanceScorer, PolicySpec, SpecError, Trigger
from kvpolicy.loading import installed
from kvpolicy.spec import yaml_text

GOOD = """\
schema_version: 1
policy: p
budget: {tokens: 64}
trigger: {every: 16}
protect: {sinks: 4, recent: {count: 8}, prompt: false}
importance: {use: window_attention, observe: 8}
redundancy: key_cosine
mixer: {use: linear, weight: 0.1}
"""


@pytest.fixture(scope="module")
def schema():
    return kvpolicy.json_schema()


def accepts(schema, text):
    return Draft202012Validator(schema).is_valid(yaml_text.parse(text, "t").data)


def loads(text):
    try:
        PolicySpec.from_yaml(text)
    except SpecError:
        return False
    return True


def test_it_is_a_schema_of_draft_2020_12(schema):
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize("name", [e.name for e in kvpolicy.catalog().policies()])
def test_registered_files_and_what_is_written_are_valid(schema, name):
    assert accepts(schema, kvpolicy.catalog().policy(name).path.read_text())
    assert accepts(schema, kvpolicy.load(name).to_yaml())


# What is replaced in GOOD, by what, and whether the result is a policy.
CASES = [
    ("trigger: {every: 16}", "trigger: each_step", True),
    ("trigger: {every: 16}", "trigger: {every: true}", True),
    ("trigger: {every: 16}", "trigger: {every: {align: 4}}", True),
    ("trigger: {every: 16}", "trigger: {use: every, align: 4}", True),
    ("trigger: {every: 16}", "trigger: {every: 0}", False),
    ("trigger: {every: 16}", "trigger: {every: false}", False),
    ("trigger: {every: 16}", "trigger: {evry: 16}", False),
    ("trigger: {every: 16}", "trigger: {interval: 16}", False),
    ("trigger: {every: 16}\n", "", False),
    ("sinks: 4", "sinks: true", True),
    ("sinks: 4", "sinks: false", True),
    ("sinks: 4", "sinks: four", False),
    ("sinks: 4", "sink: 4", False),
    ("sinks: 4", "sinks: {cuont: 4}", False),
    ("prompt: false", "prompt: 3", False),
    ("observe: 8", "group: mean", True),
    ("observe: 8", "observe: 0", False),
    ("observe: 8", "observe: '8'", False),
    ("observe: 8", "group: median", False),
    ("observe: 8", "observed: 8", False),
    ("window_attention", "window_atention", False),
    ("redundancy: key_cosine", "redundancy: {use: key_cosine}", True),
    ("redundancy: key_cosine", "redundancy: none", True),
    ("redundancy: key_cosine", "redundancy: key_norm", False),
    ("redundancy: key_cosine", "redundancy:", False),
    ("redundancy: key_cosine", "redundancy: {threshold: 0.5}", False),
    ("{tokens: 64}", "64", True),
    ("{tokens: 64}", "0.5", True),
    ("{tokens: 64}", "{fraction: 1}", True),
    ("{tokens: 64}", "{fraction: 0}", False),
    ("{tokens: 64}", "{fraction: 1.5}", False),
    ("{tokens: 64}", "{tokens: 0}", False),
    ("{tokens: 64}", "{tokens: 64, fraction: 0.5}", False),
    ("{tokens: 64}", "{}", False),
    ("policy: p", "policy: P p", False),
    ("policy: p\n", "", False),
    ("schema_version: 1", "schema_version: 2", False),
    ("schema_version: 1\n", "", False),
    ("redundancy:", "post: [rerotate]\nredundancy:", True),
    ("redundancy:", "post: [{use: rerotate}]\nredundancy:", True),
    ("redundancy:", "post: rerotate\nredundancy:", False),
    ("redundancy:", "phase: both\nprefill_chunk: 64\nredundancy:", True),
    ("redundancy:", "prefill_chunk: null\nredundancy:", True),
    ("redundancy:", "phase: never\nredundancy:", False),
    ("redundancy:", "phases: both\nredundancy:", False),
    ("redundancy:", "departures: [a, b]\nredundancy:", True),
    ("redundancy:", "departures: a\nredundancy:", False),
    ("redundancy:", "extends: h2o\nredundancy:", True),
    ("redundancy:", "extends: 3\nredundancy:", False),
]


@pytest.mark.parametrize(("old", "new", "good"), CASES, ids=[f"{new or 'no ' + old}".strip() for old, new, _ in CASES])
def test_schema_and_loader_agree(schema, old, new, good):
    assert GOOD.count(old) == 1
    text = GOOD.replace(old, new)
    assert (accepts(schema, text), loads(text)) == (good, good)


@pytest.mark.parametrize(
    ("rest", "good"),
    [
        ("", True),
        ("mixer: {weight: 0.5}\ntrigger: {align: 4}\nbudget: 99\n", True),
        ("importance: {use: random}\n", True),
        ("importance: {use: randum}\n", False),
        ("mixr: {weight: 0.5}\n", False),
    ],
)
def test_files_that_extend_may_be_partial(schema, rest, good):
    text = f"schema_version: 1\npolicy: v\nextends: rkv\n{rest}"
    assert (accepts(schema, text), loads(text)) == (good, good)


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    low: float = 0.0


class Third(ImportanceScorer):
    """Comes from elsewhere.

    Not part of the summary.
    """

    gain: float = Field(ge=0)
    """How strongly."""
    inner: Inner = Inner()
    mode: Literal["a", "b"] = "a"

    def score(self, view):
        raise NotImplementedError


class Odd(Trigger):
    """Fires oddly."""

    def fires(self, counters):
        raise NotImplementedError

    def buffer(self):
        return 1


def test_third_party_components_are_in_it():
    catalog = installed.load_catalog()
    catalog.register("third", Third)
    catalog.register("odd", Odd)
    with installed.using(catalog):
        schema = kvpolicy.json_schema()
        Draft202012Validator.check_schema(schema)
        (form,) = [f for f in schema["$defs"]["importance"]["anyOf"] if f["title"] == "third"]  # no short form: `gain`
        assert form["description"] == "Comes from elsewhere."
        assert form["properties"]["gain"]["description"] == "How strongly."
        assert form["required"] == ["use", "gain"]
        old = "importance: {use: window_attention, observe: 8}"
        for new, good in [
            ("importance: {use: third, gain: 1, inner: {low: 2.5}, mode: b}", True),
            ("importance: third", False),
            ("importance: {use: third, gain: 1, inner: {high: 2}}", False),
            ("importance: {use: third, gain: 1, mode: c}", False),
        ]:
            text = GOOD.replace(old, new)
            assert (accepts(schema, text), loads(text)) == (good, good), new
        assert accepts(schema, GOOD.replace("{every: 16}", "odd"))
    assert not accepts(kvpolicy.json_schema(), GOOD.replace("{every: 16}", "odd"))


def test_every_field_and_parameter_is_described(schema):
    for field in PolicySpec.model_fields:
        assert schema["properties"][field]["description"], field
    for kind in ("importance", "redundancy", "mixer", "allocator", "selector", "trigger", "post"):
        for form in schema["$defs"][kind]["anyOf"]:
            assert form["description"], form["title"]
            for name, parameter in form.get("properties", {}).items():
                assert name == "use" or parameter["description"], (form["title"], name)
