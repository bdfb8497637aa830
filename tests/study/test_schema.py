"""One JSON schema serves policy and study files."""

from __future__ import annotations

import jsonschema
import pytest
import yaml
from hypothesis import given

import kvpolicy
from kvpolicy.study.schema import files_schema
from kvpolicy.testing.study_specs import studies

STUDY = """\
schema_version: 1
kind: study
study: mine
base: {extends: rkv, mixer: {weight: 0.3}}
axes: {budget: [64, {trace: 0.1}], policy: [snapkv, {extends: h2o}]}
models: [smollm2]
datasets: [gsm8k, {use: needle, words: 100}]
quick: {samples: 4}
"""


@pytest.fixture(scope="module")
def validator():
    schema = files_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_a_good_study_is_valid(validator):
    assert validator.is_valid(yaml.safe_load(STUDY))


@pytest.mark.parametrize("entry", [*kvpolicy.catalog().studies(), *kvpolicy.catalog().policies()], ids=lambda e: e.name)
def test_every_registered_file_is_valid(validator, entry):
    validator.validate(yaml.safe_load(entry.path.read_text()))


@given(studies())
def test_every_study_that_is_written_is_valid(spec):
    jsonschema.Draft202012Validator(files_schema()).validate(yaml.safe_load(spec.to_yaml()))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weight: 0.3", "weight: 3"),
        ("weight: 0.3", "wait: 0.3"),
        ("words: 100", "words: 1"),
        ("gsm8k", "gsm9k"),
        ("[smollm2]", "[]"),
        ("{samples: 4}", "{metrics: [exact]}"),
        ("kind: study", "kind: policy"),
        ("study: mine", "study: My study"),
        ("h2o}", "h2o, trigger: 3}"),
        ("models", "modells"),
    ],
)
def test_mistakes_in_a_study_are_not(validator, old, new):
    assert old in STUDY
    assert not validator.is_valid(yaml.safe_load(STUDY.replace(old, new)))


@pytest.mark.parametrize("key", ["kind", "schema_version", "budget"])
def test_a_policy_is_told_from_a_study(validator, key):
    policy = {"schema_version": 1, "policy": "p", "budget": 64, "trigger": {"every": 8}, "importance": "key_norm"}
    assert validator.is_valid(policy)
    changed = {**policy, "kind": "study"} if key == "kind" else {k: v for k, v in policy.items() if k != key}
    assert not validator.is_valid(changed)
