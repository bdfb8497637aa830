"""A parameter of a component may be a component: files, errors, variants, replacements, schema, command line."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator
from pydantic import Field
from typer.testing import CliRunner

import kvpolicy
from kvpolicy import ImportanceScorer, Mixer, PluginError, PolicySpec, RedundancyScorer, SpecError
from kvpolicy.cli.app import app
from kvpolicy.loading import installed
from kvpolicy.spec import ComponentRef, yaml_text


class Scaled(ImportanceScorer):
    """Scales the scores of another scorer."""

    base: ImportanceScorer
    """The scorer whose scores are scaled."""
    other: RedundancyScorer | None = None
    """Something else, or nothing."""
    factor: float = Field(default=2.0, gt=0)
    """The factor."""
    steps: tuple[int, ...] = (1, 2)
    """Some numbers."""

    def observed_queries(self):
        return self.base.observed_queries()

    def score(self, view):
        return self.base.score(view) * self.factor


class Plain(ImportanceScorer):
    """Has only defaults, one of which is a component."""

    base: ImportanceScorer = Scaled(base=installed.load_catalog().get("importance", "key_norm")())
    """The scorer."""

    def score(self, view):
        return self.base.score(view)


@pytest.fixture(autouse=True)
def catalog():
    found = installed.load_catalog()
    found.register("scaled", Scaled)
    found.register("with_default", Plain)
    with installed.using(found):
        yield found


FILE = """\
schema_version: 1
policy: p
budget: 64
trigger: {every: 16}
importance:
  use: scaled
  steps: [3, 4]
  base:
    use: window_attention
    observe: 32
"""


def spec_of(importance, **fields):
    return PolicySpec(policy="p", budget=64, trigger={"every": 16}, importance=importance, **fields)


def error_of(text):
    with pytest.raises(SpecError) as caught:
        PolicySpec.from_yaml(text, "p.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_reference_in_a_reference_is_a_component(catalog):
    spec = PolicySpec.from_yaml(FILE)
    scorer = spec.build().importance
    assert isinstance(scorer, Scaled)
    assert type(scorer.base) is catalog.get("importance", "window_attention")
    assert (scorer.base.observe, scorer.other, scorer.factor, scorer.steps) == (32, None, 2.0, (3, 4))
    assert spec.build().observed_queries == 32
    assert spec.importance.params["base"]["use"] == "window_attention"
    assert spec.importance.params["base"]["observe"] == 32
    assert spec.importance.params["base"]["smooth"] == scorer.base.smooth
    assert list(spec.importance.params) == ["base", "other", "factor", "steps"]
    assert str(spec.importance).startswith("scaled(base=window_attention(observe=32, ")


def test_a_name_alone_stands_for_its_defaults(catalog):
    short = spec_of({"use": "scaled", "base": "window_attention", "other": "key_cosine"})
    long = spec_of({"use": "scaled", "base": {"use": "window_attention"}, "other": {"use": "key_cosine"}})
    assert short == long
    assert hash(short.importance) == hash(long.importance)
    assert isinstance(short.build().importance.other, RedundancyScorer)


def test_instances_and_references_say_the_same(catalog):
    window = catalog.get("importance", "window_attention")(observe=32)
    written = PolicySpec.from_yaml(FILE)
    assert spec_of(Scaled(base=window, steps=(3, 4))) == written
    assert spec_of({"use": "scaled", "base": window, "steps": [3, 4]}) == written
    assert spec_of({"use": "scaled", "base": ComponentRef("window_attention", window), "steps": [3, 4]}) == written


@pytest.mark.parametrize(
    "importance",
    [
        {"use": "scaled", "base": {"use": "window_attention", "observe": 32}, "steps": []},
        {"use": "scaled", "base": "key_norm"},
        {"use": "scaled", "base": {"use": "scaled", "base": {"use": "scaled", "base": "random", "factor": 3.5}}},
        {"use": "scaled", "base": "key_norm", "other": {"use": "key_cosine", "threshold": 0.25}},
        "with_default",
        {"use": "with_default", "base": {"use": "random", "seed": 3}},
    ],
)
def test_yaml_and_data_read_back_to_the_same(importance):
    spec = spec_of(importance)
    assert PolicySpec.from_yaml(spec.to_yaml()) == spec
    assert PolicySpec(**spec.to_data()) == spec
    assert json.loads(json.dumps(spec.to_data())) == spec.to_data()
    assert Draft202012Validator(kvpolicy.json_schema()).is_valid(yaml_text.parse(spec.to_yaml(), "t").data)


def test_what_is_written_is_short():
    assert "base: key_norm" in spec_of({"use": "scaled", "base": {"use": "key_norm"}}).to_yaml()


# What is replaced in FILE, by what, and how the message begins.
ERRORS = {
    "unknown component": (
        "use: window_attention",
        "use: window_atention",
        "p.yaml:8:3: importance.base: unknown importance 'window_atention'. Did you mean 'window_attention'? Known: ",
    ),
    "unknown parameter": (
        "observe: 32",
        "observed: 32",
        (
            "p.yaml:10:5: importance.base.observed: 'window_attention' has no such parameter. Did you mean 'observe'? "
            "Parameters: observe,"
        ),
    ),
    "out of bounds": (
        "observe: 32",
        "observe: 0",
        "p.yaml:10:5: importance.base.observe: should be greater than or equal to 1, got 0.",
    ),
    "another kind": (
        "use: window_attention\n    observe: 32",
        "use: key_cosine",
        "p.yaml:8:3: importance.base: unknown importance 'key_cosine'. That is the name of a redundancy. Known: ",
    ),
    "no use": (
        "    use: window_attention\n",
        "",
        "p.yaml:8:3: importance.base: does not say which component. Write {use: name, ...} with one of ",
    ),
    "use is a number": (
        "use: window_attention",
        "use: 3",
        "p.yaml:9:5: importance.base.use: should be the name of a component, got 3.",
    ),
    "a number": (
        "  base:\n    use: window_attention\n    observe: 32\n",
        "  base: 3\n",
        "p.yaml:8:3: importance.base: should be the name of a component or {use: name, ...}, got 3.",
    ),
    "missing": (
        "  base:\n    use: window_attention\n    observe: 32\n",
        "",
        "p.yaml:5:1: importance.base: is required; write the name of a component of kind importance: ",
    ),
    "empty": (
        "  base:\n    use: window_attention\n    observe: 32\n",
        "  base:\n",
        "p.yaml:8:3: importance.base: should be the name of a component or {use: name, ...}, got None.",
    ),
    "beside it": (
        "  steps: [3, 4]\n",
        "  factor: 0\n",
        "p.yaml:7:3: importance.factor: should be greater than 0, got 0.",
    ),
    "a list beside it": (
        "  steps: [3, 4]\n",
        "  steps: [3, x]\n",
        "p.yaml:7:14: importance.steps.1: should be a valid integer, got 'x'.",
    ),
}


@pytest.mark.parametrize(("old", "new", "message"), ERRORS.values(), ids=ERRORS)
def test_an_error_inside_names_its_place_and_the_mend(old, new, message):
    assert FILE.count(old) == 1
    assert error_of(FILE.replace(old, new)).startswith(message)


def test_the_component_inside_may_be_of_one_kind_only(catalog):
    with pytest.raises(
        SpecError, match=r"importance\.base: should be a component of kind importance, got NoRedundancy"
    ):
        spec_of({"use": "scaled", "base": catalog.get("redundancy", "none")()})
    with pytest.raises(
        SpecError, match=r"importance\.base: should be a component of kind importance, got NoRedundancy"
    ):
        PolicySpec.from_yaml(FILE).replace("importance.base", catalog.get("redundancy", "none")())


def test_replace_reaches_inside():
    spec = PolicySpec.from_yaml(FILE)
    smaller = spec.replace("importance.base.observe", 16)
    assert smaller.build().importance.base.observe == 16
    assert smaller.build().importance.steps == (3, 4)
    assert smaller.replace("importance.base.observe", 32) == spec
    named = spec.replace("importance.base", "window_attention")
    assert named.build().importance.base.observe == 8  # as a whole: the default
    other = spec.replace("importance.base.use", "random")
    assert other.importance.params["base"] == {"use": "random", "seed": 0}
    assert other.importance.params["steps"] == [3, 4]
    deep = spec.replace({"importance.base": "scaled", "importance.base.base": "random", "importance.base.base.seed": 7})
    assert deep.build().importance.base.base.seed == 7
    with pytest.raises(SpecError, match=r"importance\.base\.observed: .* Did you mean 'observe'"):
        spec.replace("importance.base.observed", 16)


def variant(tmp_path, importance):
    (tmp_path / "base.yaml").write_text(FILE)
    path = tmp_path / "variant.yaml"
    path.write_text(f"schema_version: 1\npolicy: v\nextends: base.yaml\nimportance: {importance}\n")
    return path


def test_a_variant_changes_what_is_inside(tmp_path):
    changed = PolicySpec.from_file(variant(tmp_path, "{base: {observe: 16}, factor: 3.0}")).build().importance
    assert (changed.base.observe, changed.factor, changed.steps) == (16, 3.0, (3, 4))
    replaced = PolicySpec.from_file(variant(tmp_path, "{base: {use: random, seed: 3}}")).build().importance
    assert (replaced.base.seed, replaced.steps) == (3, (3, 4))
    named = PolicySpec.from_file(variant(tmp_path, "{base: key_norm}")).importance.params
    assert (named["base"], named["steps"]) == ({"use": "key_norm"}, [3, 4])
    schema = kvpolicy.json_schema()
    for text in ("{base: {observe: 16}}", "{base: {use: random, seed: 3}}", "{base: key_norm}"):
        document = yaml_text.parse(variant(tmp_path, text).read_text(), "t").data
        assert Draft202012Validator(schema).is_valid(document), text


def test_a_variant_of_a_variant_may_name_its_base_in_short(tmp_path):
    variant(tmp_path, "{base: window_attention}")
    top = tmp_path / "top.yaml"
    top.write_text("schema_version: 1\npolicy: t\nextends: variant.yaml\nimportance: {base: {observe: 5}}\n")
    scorer = PolicySpec.from_file(top).build().importance
    assert scorer.base.observe == 5
    assert scorer.steps == (3, 4)


def test_an_error_of_a_variant_stands_where_it_was_written(tmp_path):
    path = variant(tmp_path, "{base: {use: random, sed: 3}}")
    with pytest.raises(SpecError, match=rf"{path}:4:34: importance\.base\.sed: 'random' has no such parameter"):
        PolicySpec.from_file(path)
    path = variant(tmp_path, "{factor: 3.0}")
    (tmp_path / "base.yaml").write_text(FILE.replace("observe: 32", "observe: 0"))
    with pytest.raises(SpecError, match=r"base\.yaml:10:5: importance\.base\.observe"):
        PolicySpec.from_file(path)


@pytest.mark.parametrize(
    ("old", "new", "good"),
    [
        ("observe: 32", "observe: 16", True),
        ("observe: 32", "observe: 0", False),
        ("observe: 32", "observed: 16", False),
        ("use: window_attention", "use: window_atention", False),
        ("use: window_attention\n    observe: 32", "use: key_cosine", False),
        ("    use: window_attention\n", "", False),
        ("  steps: [3, 4]", "  other: none", True),
        ("  steps: [3, 4]", "  other: null", True),
        ("  steps: [3, 4]", "  other: key_norm", False),
        ("  base:\n    use: window_attention\n    observe: 32\n", "  base: key_norm\n", True),
        ("  base:\n    use: window_attention\n    observe: 32\n", "", False),
    ],
)
def test_schema_and_loader_agree(old, new, good):
    assert FILE.count(old) == 1
    text = FILE.replace(old, new)
    schema = kvpolicy.json_schema()
    Draft202012Validator.check_schema(schema)
    assert Draft202012Validator(schema).is_valid(yaml_text.parse(text, "t").data) is good
    if good:
        PolicySpec.from_yaml(text)
    else:
        error_of(text)


def test_the_schema_completes_inside(catalog):
    schema = kvpolicy.json_schema()
    named = [form for form in schema["$defs"]["importance"]["anyOf"] if form["title"] == "scaled"]
    (form,) = [form for form in named if "properties" in form]
    base = form["properties"]["base"]
    assert base == {"anyOf": [{"$ref": "#/$defs/importance"}], "description": "The scorer whose scores are scaled."}
    assert form["properties"]["other"]["anyOf"] == [{"$ref": "#/$defs/redundancy"}, {"type": "null"}]
    assert "importance.scaled.ImportanceScorer" not in schema["$defs"]
    (default,) = [
        f for f in schema["$defs"]["importance"]["anyOf"] if f["title"] == "with_default" and "properties" in f
    ]
    assert default["properties"]["base"]["default"]["base"] == {"use": "key_norm"}


def test_show_diff_and_explain_speak_of_what_is_inside(tmp_path):
    path = variant(tmp_path, "{base: {observe: 16}}")
    run = CliRunner()
    shown = run.invoke(app, ["show", str(path)]).output
    assert "base: {use: window_attention, observe: 16, " in shown
    assert "\n    observe" in shown
    explained = " ".join(run.invoke(app, ["explain", str(path)]).output.split())
    assert "Scales the scores of another scorer. Its base is window_attention(observe=16" in explained
    diff = run.invoke(app, ["show", "--diff", str(tmp_path / "base.yaml"), str(path)]).output
    assert [line.split() for line in diff.splitlines()][1] == ["importance.base.observe", "32", "16"]


def test_a_parameter_that_no_file_can_write_is_refused(catalog):
    class Many(Scaled):
        base: tuple[ImportanceScorer, ...] = ()

    class Either(Scaled):
        base: ImportanceScorer | RedundancyScorer

    class Exact(Scaled):
        base: Scaled

    for broken in (Many, Either, Exact):
        with pytest.raises(
            PluginError, match=r"cannot write the parameter 'base'.*; give it the base class of one kind"
        ):
            catalog.register("broken", broken)


def test_a_trigger_or_mixer_inside_is_written_with_use(catalog):
    class Mixed(Mixer):
        """Mixes as another mixer does."""

        base: Mixer
        """It."""

        def mix(self, importance, redundancy, view):
            return self.base.mix(importance, redundancy, view)

    catalog.register("mixed", Mixed)
    spec = spec_of(
        "key_norm", redundancy="key_cosine", mixer={"use": "mixed", "base": {"use": "linear", "weight": 0.3}}
    )
    assert spec.build().mixer.base.weight == 0.3
    assert PolicySpec.from_yaml(spec.to_yaml()) == spec
