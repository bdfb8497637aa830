"""Specifications that extend others, the files they stand in, and parameters of third parties."""

from __future__ import annotations

import enum
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

import kvpolicy
from kvpolicy import ImportanceScorer, PolicySpec, SpecError
from kvpolicy.contracts.budget import Budget
from kvpolicy.loading import installed
from kvsupport.spec_shapes import SHORT


class Shape(enum.Enum):
    ROUND = "round"
    FLAT = "flat"


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    low: float = 0.0


class Rich(ImportanceScorer):
    """A third party's component with every shape of parameter."""

    shorthand = "layers"

    layers: tuple[int, ...] = (1, 2)
    shape: Shape = Shape.ROUND
    inner: Inner = Inner()
    table: dict[str, float] = Field(default={}, exclude=False)
    size: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    name: str = ""

    def score(self, view):
        raise NotImplementedError


def variant(text, **fields):
    """A file that extends."""
    return PolicySpec.from_yaml(f"schema_version: 1\npolicy: variant\n{text}", **fields)


def test_extends_merges_deeply_and_replaces_what_differs():
    spec = variant(
        "extends: rkv\nmixer: {weight: 0.5}\nprotect: {sinks: false, prompt: true}\ntrigger: {every: {align: 16}}"
    )
    base = kvpolicy.load("rkv")
    assert spec.mixer.data == {"use": "linear", "weight": 0.5}
    assert {ref.use: ref.params for ref in spec.protect} == {"recent": {"count": 8}, "prompt": {}}
    assert spec.trigger.params == {"interval": base.trigger.params["interval"], "align": 16}
    assert (spec.policy, spec.importance) == ("variant", base.importance)


def test_what_a_base_says_of_itself_is_not_its_variants(tmp_path):
    words = ("description", "paper", "departures")
    spec = variant("extends: rkv\nmixer: {weight: 0.5}")
    assert all(getattr(kvpolicy.load("rkv"), field) for field in words)
    assert [getattr(spec, field) for field in words] == ["", "", ()]
    (tmp_path / "twice.yaml").write_text(f"{spec.to_yaml()}paper: mine\n")
    again = variant(f"extends: {tmp_path}/twice.yaml\ndepartures: [one]")
    assert [getattr(again, field) for field in words] == ["", "", ("one",)]


def test_a_policy_that_is_renamed_says_of_itself_what_it_is_told(rkv):
    assert rkv.replace("mixer.weight", 0.3).paper == rkv.paper
    renamed = rkv.replace({"policy": "other", "paper": "mine"})
    assert (renamed.policy, renamed.paper, renamed.departures, renamed.description) == ("other", "mine", (), "")
    assert kvpolicy.load("rkv", policy="other").departures == ()


def test_extends_with_another_component_drops_the_old_parameters():
    spec = variant("extends: rkv\nimportance: {use: random, seed: 3}\nbudget: {fraction: 0.5}\n")
    assert spec.importance.data == {"use": "random", "seed": 3}
    assert spec.budget == Budget(fraction=0.5)


def test_extends_keeps_the_shorthand_of_the_base(tmp_path):
    (tmp_path / "base.yaml").write_text(SHORT.replace("each_step", "{every: 32}"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mid.yaml").write_text(
        "schema_version: 1\npolicy: mid\nextends: ../base.yaml\nprotect: {recent: 8}\n"
    )
    top = tmp_path / "top.yaml"
    top.write_text(
        "schema_version: 1\npolicy: top\nextends: sub/mid.yaml\ntrigger: {align: 4}\nprotect: {recent: {}}\n"
    )
    spec = PolicySpec.from_file(top)
    assert spec.trigger.params == {"interval": 32, "align": 4}
    assert [ref.params for ref in spec.protect] == [{"count": 8}]
    assert spec.importance.use == "key_norm"
    assert "extends" not in spec.to_yaml()


def test_extends_from_text_uses_the_folder_of_its_source(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text(SHORT)
    text = "schema_version: 1\npolicy: v\nextends: ./base.yaml\n"
    file = tmp_path / "v.yaml"
    file.write_text(text)
    assert PolicySpec.from_yaml(text, str(file)).importance.use == "key_norm"
    monkeypatch.chdir(tmp_path)
    assert PolicySpec.from_yaml(text).importance.use == "key_norm"


def test_names_are_looked_for_in_order(tmp_path, monkeypatch):
    for folder, phase in (("a", "prefill"), ("b", "both")):
        (tmp_path / folder).mkdir()
        for name in ("mine", "rkv"):
            text = SHORT.replace("policy: short", f"policy: {name}") + f"phase: {phase}\n"
            (tmp_path / folder / f"{name}.yml").write_text(text)
    with pytest.raises(SpecError, match="unknown policy 'mine'"):
        kvpolicy.load("mine")
    monkeypatch.setenv("KVPOLICY_POLICY_PATH", str(tmp_path / "b"))
    assert kvpolicy.load("mine").phase == "both"
    assert kvpolicy.load("mine", search=tmp_path / "a").phase == "prefill"
    assert kvpolicy.load("mine", search=[tmp_path / "b", tmp_path / "a"]).phase == "both"
    assert kvpolicy.load("rkv").redundancy.use == "key_cosine"
    assert kvpolicy.load(str(tmp_path / "a" / "rkv.yml")).phase == "prefill"
    assert kvpolicy.load(tmp_path / "a" / "rkv.yml").phase == "prefill"
    assert variant("extends: mine\n").phase == "both"
    with pytest.raises(SpecError, match="Did you mean 'mine'"):
        kvpolicy.load("mime")


def test_a_file_beside_may_have_no_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").write_text(SHORT)
    assert kvpolicy.load("plain").policy == "short"


def test_registered_text_is_a_policy():
    catalog = installed.load_catalog()
    catalog.register_policy("short", SHORT)
    catalog.register_policy("wrong", SHORT)
    with installed.using(catalog):
        assert kvpolicy.load("short").importance.use == "key_norm"
        with pytest.raises(SpecError, match=r"policy: is 'short', but the file is registered as 'wrong'"):
            kvpolicy.load("wrong")


def test_utf8_with_and_without_bom(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        file = tmp_path / f"{encoding}.yaml"
        file.write_text(SHORT + "description: λ·I − R\n", encoding=encoding)
        assert PolicySpec.from_file(file).description == "λ·I − R"


@pytest.fixture
def with_rich():
    catalog = installed.load_catalog()
    catalog.register("rich", Rich)
    with installed.using(catalog):
        yield


@pytest.mark.usefixtures("with_rich")
def test_rich_parameters_round_trip():
    text = SHORT.replace(
        "importance: key_norm",
        "importance: {use: rich, layers: [3, 4], shape: flat, inner: {low: 1e-3}, table: {a: 1}, size: 7, name: no}",
    )
    spec = PolicySpec.from_yaml(text)
    expected = Rich(layers=(3, 4), shape=Shape.FLAT, inner=Inner(low=0.001), table={"a": 1.0}, size=7, name="no")
    assert spec.build().importance == expected
    assert PolicySpec.from_yaml(spec.to_yaml()) == spec
    assert PolicySpec(**{**spec.to_data(), "importance": expected}) == spec
    assert spec.replace("importance.inner.low", 2.0).build().importance.inner.low == 2.0
    assert spec.replace("importance.size", "all").build().importance.size == "all"
    assert spec.replace("importance.layers", (9,)).build().importance.layers == (9,)
