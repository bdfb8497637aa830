"""A field or parameter that was renamed is read on under its former name, with one warning for each file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

import jsonschema
import pytest

import kvpolicy
from kvpolicy import FormerNameWarning, ImportanceScorer, PolicySpec, SpecError
from kvpolicy.cli import main
from kvpolicy.errors import PluginError
from kvpolicy.loading import installed
from kvpolicy.spec import former

BASE = """\
schema_version: 1
policy: old
budget: {tokens: 64}
trigger: {every: 8}
importance: {use: renamed, width: 3, decay: 0.5}
"""


class Renamed(ImportanceScorer):
    """Scores that have been renamed."""

    span: int = 1
    """How far."""
    decay: float = 1.0
    """How fast."""
    base: ImportanceScorer | None = None
    """What it is made of."""

    formerly: ClassVar[Mapping[str, str]] = {"width": "span", "fade": "decay", "inner": "base"}

    def score(self, view):
        return view.keys.float().amax(-1)


@pytest.fixture
def known():
    catalog = installed.load_catalog()
    catalog.register("renamed", Renamed)
    with installed.using(catalog):
        yield catalog


def read(text, source="mine.yaml", **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spec = PolicySpec.from_yaml(text, source, **options)
    assert all(each.category is FormerNameWarning for each in caught)
    return spec, [str(each.message) for each in caught]


def test_an_old_file_is_read_with_one_warning(known):
    spec, said = read(BASE.replace("decay", "fade"))
    assert spec.importance.params["span"] == 3
    assert spec.importance.params["decay"] == 0.5
    assert said == [
        (
            "mine.yaml:5:28: importance.width: is called `span` now, and the former name will be refused from the next "
            "major version on; write `span` (1 more former name behind this one)."
        )
    ]
    again, silent = read(spec.to_yaml())
    assert (again, silent) == (spec, [])


def test_present_names_warn_of_nothing(known):
    assert read(BASE.replace("width", "span"))[1] == []


def test_a_file_that_extends_another_says_of_what_its_parameters_are(known, tmp_path):
    (tmp_path / "old.yaml").write_text(BASE)
    overlay = "schema_version: 1\npolicy: new\nextends: old\nimportance: {width: 5}\n"
    spec, said = read(overlay, "new.yaml", search=tmp_path)
    assert spec.importance.params["span"] == 5
    assert [text.partition(": ")[0] for text in said] == [f"{tmp_path / 'old.yaml'}:5:28", "new.yaml:4:14"]
    (tmp_path / "old.yaml").write_text(BASE.replace("width", "span"))
    assert read(overlay, "new.yaml", search=tmp_path)[0].importance.params["span"] == 5
    # And the other way round: the base is old and what is laid over it is new.
    (tmp_path / "old.yaml").write_text(BASE)
    spec, said = read(overlay.replace("width", "span"), "new.yaml", search=tmp_path)
    assert spec.importance.params["span"] == 5
    assert len(said) == 1


def test_components_within_components_and_other_forms(known):
    spec, said = read(BASE.replace("width: 3", "inner: {use: renamed, width: 9}"))
    assert spec.importance.held["base"].params["span"] == 9
    assert len(said) == 1
    with pytest.warns(FormerNameWarning, match=r"^importance\.width: is called `span` now"):
        made = PolicySpec(policy="p", budget=64, trigger={"every": 8}, importance={"use": "renamed", "width": 4})
    assert made.importance.params["span"] == 4
    with pytest.warns(FormerNameWarning, match="importance.width"):
        assert made.replace("importance.width", 6).importance.params["span"] == 6


def test_a_field_that_was_renamed(known, monkeypatch, tmp_path):
    monkeypatch.setitem(former.FIELDS, "when", "trigger")
    spec, said = read(BASE.replace("trigger", "when").replace("width", "span"))
    assert spec == read(BASE.replace("width", "span"))[0]
    assert said[0].startswith("mine.yaml:4:1: when: is called `trigger` now")
    with pytest.warns(FormerNameWarning, match="^when: is called `trigger`"):
        assert spec.replace("when.every", 16).trigger.params["interval"] == 16
    with pytest.raises(SpecError, match=r"mine.yaml:5:1: when: is the former name of `trigger`, which is given, too"):
        PolicySpec.from_yaml(
            BASE.replace("importance: {use: renamed, width: 3", "when: {every: 4}\nimportance: {use: renamed"),
            "mine.yaml",
        )
    schema = kvpolicy.json_schema()
    assert schema["properties"]["when"]["deprecated"] is True


def test_both_names_are_refused(known):
    with pytest.raises(SpecError, match=r"importance\.width: is the former name of `span`, which is given, too"):
        PolicySpec.from_yaml(BASE.replace("width: 3", "width: 3, span: 4"))


def test_mistakes_are_told_at_their_place_under_a_former_name(known):
    with pytest.warns(FormerNameWarning), pytest.raises(SpecError, match=r"^mine.yaml:5:28: importance\.span: should"):
        PolicySpec.from_yaml(BASE.replace("width: 3", "width: three"), "mine.yaml")


def test_editors_are_told(known):
    import yaml

    schema = kvpolicy.json_schema()
    jsonschema.validate(yaml.safe_load(BASE), schema)
    forms = [each for each in schema["$defs"]["importance"]["anyOf"] if each.get("title") == "renamed"]
    properties = next(each for each in forms if "properties" in each)["properties"]
    assert properties["width"]["deprecated"] is True
    assert "deprecated" not in properties["span"]


def test_the_command_line_says_it_once(known, tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text(BASE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert main(["validate", str(path)]) == main(["show", str(path)]) == 0
    assert [str(each.message).partition(": ")[0] for each in caught] == [f"{path}:5:28"]


def test_a_class_that_says_it_wrongly_is_refused():
    class Wrong(Renamed):
        formerly: ClassVar[Mapping[str, str]] = {"span": "decay"}

    class Lost(Renamed):
        formerly: ClassVar[Mapping[str, str]] = {"width": "nowhere"}

    for each in (Wrong, Lost):
        with pytest.raises(PluginError, match="formerly says that"):
            installed.load_catalog().register("wrong", each)


@pytest.mark.parametrize(("field", "name"), [("policy", "rkv-pyramid"), ("backend", "triton"), ("study", "scope")])
def test_a_field_that_holds_no_component_is_not_looked_up_as_one(field, name):
    named = "" if field == "policy" else "policy: mine\n"
    with pytest.raises(SpecError, match=f"{field}"):
        PolicySpec.from_yaml(f"schema_version: 1\nextends: rkv\n{named}{field}: {{use: {name}}}\n")
