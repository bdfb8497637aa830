"""The JSON schema gives completion and hover texts in editors, third-party components included."""

from __future__ import annotations

import json
import sys
import uuid

import jsonschema
import pytest
import yaml

import kvpolicy
from kvpolicy import PolicySpec, SpecError
from kvpolicy.loading import installed
from kvpolicy.spec import forms

GOOD = """\
schema_version: 1
policy: p
budget: {tokens: 64}
trigger: {every: 16}
protect: {sinks: 4, recent: 8}
importance: {use: window_attention, observe: 8}
redundancy: key_cosine
mixer: {use: linear, weight: 0.1}
post: [rerotate]
"""


@pytest.fixture(scope="module")
def validator():
    schema = kvpolicy.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def nodes(schema, path=()):
    """Yield every schema within a schema, with the keys that lead there."""
    yield path, schema
    for key, value in schema.items():
        if key in ("properties", "$defs"):
            for name, inner in value.items():
                yield from nodes(inner, (*path, key, name))
        elif key in ("anyOf", "oneOf", "allOf"):
            for i, inner in enumerate(value):
                yield from nodes(inner, (*path, key, i))
        elif key in ("items", "if", "then", "else", "not", "additionalProperties") and isinstance(value, dict):
            yield from nodes(value, (*path, key))


def by_use(schema, kind):
    """Return the forms of a kind that are written with `use:`, by name."""
    found = {}
    for form in schema["$defs"][kind]["anyOf"]:
        use = form.get("properties", {}).get("use")
        if use is not None:
            found[use["const"]] = form
    return found


def test_components_are_told_apart_by_use():
    schema = kvpolicy.json_schema()
    for kind in (*forms.REFERENCES, "post"):
        found = by_use(schema, kind)
        assert sorted(found) == kvpolicy.catalog().names(kind)
        for form in found.values():
            assert "use" in form["required"]
            assert form["additionalProperties"] is False


def test_everything_that_can_be_written_has_a_hover_text():
    for path, schema in nodes(kvpolicy.json_schema()):
        for name, inner in schema.get("properties", {}).items():
            described = inner.get("description") or ("else" in path and "$ref" in inner)
            assert described, (*path, name)
    for kind in (*forms.REFERENCES, "post"):
        for form in kvpolicy.json_schema()["$defs"][kind]["anyOf"]:
            assert form.get("description"), (kind, form)


def test_defaults_and_bounds_are_there():
    window = by_use(kvpolicy.json_schema(), "importance")["window_attention"]["properties"]
    assert window["observe"]["default"] == 8
    assert window["observe"]["minimum"] == 1
    assert window["group"]["enum"] == ["max", "mean"]


@pytest.mark.parametrize("entry", kvpolicy.catalog().policies(), ids=lambda entry: entry.name)
def test_registered_policies_are_valid(entry, validator):
    validator.validate(yaml.safe_load(entry.path.read_text()))
    validator.validate(json.loads(json.dumps(kvpolicy.load(entry.name).to_data())))


FORMS = [
    GOOD,
    "schema_version: 1\npolicy: p\nextends: rkv\nmixer: {weight: 0.3}\n",
    "schema_version: 1\npolicy: p\nextends: rkv\nimportance: {observe: 4}\nprotect: {recent: false, prompt: true}\n",
    GOOD.replace("{every: 16}", "{use: every, interval: 16}"),
    GOOD.replace("{every: 16}", "each_step"),
    GOOD.replace("{every: 16}", "{every: {interval: 16, align: 2}}"),
    GOOD.replace("{tokens: 64}", "64"),
    GOOD.replace("{tokens: 64}", "{fraction: 0.5}"),
    GOOD.replace("sinks: 4", "sinks: {count: 4}, prompt: false"),
    GOOD.replace("[rerotate]", "[{use: rerotate}]"),
    GOOD + "prefill_chunk: null\n",
]


@pytest.mark.parametrize("text", FORMS)
def test_what_is_read_is_valid(text, validator):
    PolicySpec.from_yaml(text)
    validator.validate(yaml.safe_load(text))


BAD = [
    (": 1\npolicy", ": 2\npolicy"),
    ("policy: p", "policy: My Policy"),
    ("policy: p", f"policy: {'x' * 65}"),
    ("policy: p\n", ""),
    ("budget: {tokens: 64}\n", ""),
    ("importance: {use: window_attention, observe: 8}\n", ""),
    ("{tokens: 64}", "{tokens: 0}"),
    ("{tokens: 64}", "{fraction: 1.5}"),
    ("{tokens: 64}", "{tokens: 64, fraction: 0.5}"),
    ("{tokens: 64}", "{tokns: 64}"),
    ("{every: 16}", "{every: 0}"),
    ("{every: 16}", "{every: many}"),
    ("{every: 16}", "{each: 16}"),
    ("observe: 8", "observe: 0"),
    ("observe: 8", "observe: '8'"),
    ("observe: 8", "obsrve: 8"),
    ("observe: 8", "group: median"),
    ("use: window_attention", "use: window_atention"),
    ("use: window_attention, observe", "observe"),
    ("redundancy: key_cosine", "redundancy: key_norm"),
    ("sinks: 4", "sink: 4"),
    ("sinks: 4", "sinks: -1"),
    ("sinks: 4", "sinks: {use: recent}"),
    ("weight: 0.1", "weight: 1.1"),
    ("[rerotate]", "rerotate"),
    ("[rerotate]", "[rotate]"),
    ("post:", "phase: always\npost:"),
    ("post:", "prefill_chunk: 0\npost:"),
    ("post:", "backend: cuda\npost:"),
    ("post:", "colour: red\npost:"),
]


@pytest.mark.parametrize(("old", "new"), BAD)
def test_what_is_refused_is_not_valid(old, new, validator):
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    with pytest.raises(SpecError):
        PolicySpec.from_yaml(text)
    assert not validator.is_valid(yaml.safe_load(text))


def test_a_part_of_a_component_is_completed_and_checked_too(validator):
    head = "schema_version: 1\npolicy: p\nextends: rkv\n"
    for part, valid in (("{observe: 4}", True), ("{obsrve: 4}", False), ("{observe: 0}", False), ("{}", True)):
        assert validator.is_valid(yaml.safe_load(f"{head}importance: {part}\n")) is valid, part


PLUGIN = """
from typing import Literal
from pydantic import BaseModel, ConfigDict, Field
from kvpolicy import ImportanceScorer, Protection, hookimpl

class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    size: int = Field(default=1, ge=1)
    \"\"\"How large the part is.\"\"\"

class Theirs(ImportanceScorer):
    \"\"\"What a third party finds important.\"\"\"
    mode: Literal["soft", "hard"] = "soft"
    \"\"\"How hard.\"\"\"
    part: Part = Part()
    \"\"\"A part.\"\"\"
    weights: tuple[float, ...] = ()
    \"\"\"Some weights.\"\"\"
    must: int
    \"\"\"It has no default.\"\"\"
    def score(self, view):
        return view.positions.float()

class Middle(Protection):
    \"\"\"The middle stays.\"\"\"
    def mask(self, view):
        return view.valid

@hookimpl
def kvpolicy_register_components(register):
    register("theirs", Theirs)
    register("middle", Middle)
"""


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """Put an installed distribution on the path, as pip would."""
    module = f"plugin_{uuid.uuid4().hex}"
    (tmp_path / f"{module}.py").write_text(PLUGIN)
    info = tmp_path / "their_dist-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-dist\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kvpolicy]\ntheirs = {module}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with installed.using(installed.load_catalog()):
        yield
    sys.modules.pop(module, None)


def test_an_installed_component_of_a_third_party_is_in_it(third_party):
    schema = kvpolicy.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    theirs = by_use(schema, "importance")["theirs"]
    assert theirs["description"] == "What a third party finds important."
    assert theirs["properties"]["mode"]["description"] == "How hard."
    assert theirs["properties"]["mode"]["enum"] == ["soft", "hard"]
    assert theirs["required"] == ["use", "must"]
    assert schema["properties"]["protect"]["properties"]["middle"]["description"] == "The middle stays."
    validator = jsonschema.Draft202012Validator(schema)
    for importance, valid in (
        ("{use: theirs, must: 3}", True),
        ("{use: theirs, must: 3, mode: hard, part: {size: 2}, weights: [1, 0.5]}", True),
        ("{use: theirs, must: 3, part: {size: 0}}", False),
        ("{use: theirs, must: 3, mode: other}", False),
        ("{use: theirs}", False),
        ("theirs", False),
    ):
        text = GOOD.replace("{use: window_attention, observe: 8}", importance).replace("sinks: 4", "middle: true")
        assert validator.is_valid(yaml.safe_load(text)) is valid, importance
        if valid:
            assert PolicySpec.from_yaml(text).importance.use == "theirs"
        else:
            with pytest.raises(SpecError):
                PolicySpec.from_yaml(text)


def test_without_the_package_its_names_are_not_in_it():
    assert "theirs" not in json.dumps(kvpolicy.json_schema())
