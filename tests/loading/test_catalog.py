from __future__ import annotations

import pytest

from kvpolicy import Catalog, PluginError, UnknownComponentError
from kvpolicy.contracts.components import ImportanceScorer, Mixer, RedundancyScorer
from kvpolicy.loading.entries import THIS_PROCESS, Origin, PluginFailure

HERE = Origin("one", "1.0", "one-plugin")
THERE = Origin("two", "2.0", "two-plugin")


class Zero(ImportanceScorer):
    def score(self, view):
        raise NotImplementedError


class ZeroTwin(RedundancyScorer):
    def score(self, view):
        raise NotImplementedError


class Half(ImportanceScorer):
    """An abstract one: `score` is missing."""


class UsesUse(Zero):
    use: str = "x"


class BadShorthand(Zero):
    shorthand = "count"


@pytest.fixture
def catalog(tmp_path):
    found = Catalog()
    found.register("zero", Zero, HERE)
    return found


def test_knows_class_and_origin(catalog):
    entry = catalog.entry("importance", "zero")
    assert (entry.component, entry.origin, entry.kind) == (Zero, HERE, "importance")
    assert catalog.get("importance", "zero") is Zero
    assert catalog.name_of(Zero) == "zero"
    assert str(entry.origin) == "one 1.0 (one-plugin)"


def test_names_are_per_kind(catalog):
    catalog.register("zero", ZeroTwin, THERE)
    assert catalog.get("redundancy", "zero") is ZeroTwin
    assert catalog.get("importance", "zero") is Zero
    assert [e.kind for e in catalog.entries()] == ["importance", "redundancy"]
    assert catalog.names("mixer") == []


def test_without_origin_it_is_this_process():
    catalog = Catalog()
    catalog.register("zero", Zero)
    assert catalog.entry("importance", "zero").origin == THIS_PROCESS


def test_collision_names_both(catalog):
    with pytest.raises(PluginError) as caught:
        catalog.register("zero", type("Other", (Zero,), {}), THERE)
    assert str(caught.value) == (
        "importance 'zero' is registered by one 1.0 (one-plugin) and by two 2.0 (two-plugin); rename one, "
        "or turn one plugin off with KVPOLICY_DISABLED_PLUGINS=two-plugin."
    )
    assert catalog.get("importance", "zero") is Zero


def test_twice_by_the_same_plugin_is_said_so(catalog):
    with pytest.raises(PluginError, match=r"registered twice by one 1\.0"):
        catalog.register("zero", Zero, HERE)


def test_unregister_frees_the_name(catalog):
    catalog.unregister("importance", "zero")
    with pytest.raises(UnknownComponentError):
        catalog.get("importance", "zero")
    catalog.register("zero", Zero, THERE)


def test_unknown_name_suggests_and_lists(catalog):
    catalog.register("one", type("One", (Zero,), {}), HERE)
    with pytest.raises(UnknownComponentError) as caught:
        catalog.get("importance", "zeros")
    assert str(caught.value) == "unknown importance 'zeros'. Did you mean 'zero'? Known: one, zero."


def test_unknown_name_of_an_empty_kind(catalog):
    with pytest.raises(UnknownComponentError, match="No mixer is registered"):
        catalog.get("mixer", "linear")


def test_unknown_name_tells_of_broken_and_disabled_plugins(catalog):
    catalog.failures.append(PluginFailure(THERE, PluginError("plugin 'two-plugin' of two 2.0 failed to load: boom.")))
    catalog.disabled.append(Origin("three", "3", "third"))
    with pytest.raises(UnknownComponentError, match=r"failed to load: boom\..*'third' is turned off"):
        catalog.get("importance", "fancy")


def test_unknown_kind_is_a_programming_error(catalog):
    with pytest.raises(KeyError, match="not a kind"):
        catalog.get("scorer", "zero")


@pytest.mark.parametrize(
    ("name", "component", "message"),
    [
        ("Bad Name", Zero, "not a component name"),
        ("", Zero, "not a component name"),
        (3, Zero, "not a component name"),
        ("x", object, "not a component"),
        ("x", "kvpolicy", "not a component"),
        ("x", Half, "abstract; implement score"),
        ("x", Mixer, "abstract; implement mix"),
        ("x", UsesUse, "cannot be called 'use'"),
        ("x", BadShorthand, "shorthand 'count' is not one of its parameters"),
    ],
)
def test_what_is_not_a_component_is_refused(catalog, name, component, message):
    with pytest.raises(PluginError, match=message):
        catalog.register(name, component, THERE)
    assert len(catalog.entries()) == 1


def test_instances_are_not_classes(catalog):
    with pytest.raises(PluginError, match="not a component"):
        catalog.register("x", Zero(), THERE)


def test_policies_by_path_and_by_text(catalog, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("schema_version: 1\n")
    catalog.register_policy("a", file, HERE)
    catalog.register_policy("b", str(file), HERE)
    catalog.register_policy("c", "schema_version: 1\npolicy: c\n", HERE)
    assert [(e.name, e.path, e.text is None) for e in catalog.policies()] == [
        ("a", file, True),
        ("b", file, True),
        ("c", None, False),
    ]
    with pytest.raises(PluginError, match="registered by one"):
        catalog.register_policy("a", file, THERE)


@pytest.mark.parametrize(
    ("name", "what", "message"),
    [("Up", "x\ny", "not a policy name"), ("x/y", "x\ny", "not a policy name"), ("a", 3, "neither a path nor YAML")],
)
def test_what_is_not_a_policy_is_refused(catalog, name, what, message):
    with pytest.raises(PluginError, match=message):
        catalog.register_policy(name, what)


def test_missing_policy_file_is_refused(catalog, tmp_path):
    with pytest.raises(PluginError, match=r"there is no file .*gone\.yaml"):
        catalog.register_policy("a", tmp_path / "gone.yaml")


def test_name_of_an_unregistered_class(catalog):
    with pytest.raises(UnknownComponentError, match="class ZeroTwin is not registered"):
        catalog.name_of(ZeroTwin)
