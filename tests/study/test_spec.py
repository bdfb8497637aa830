from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given

import kvpolicy
import kvpolicy_registry
from kvpolicy import SpecError
from kvpolicy.loading import installed
from kvpolicy.study.spec import StudySpec, find_study
from kvpolicy.testing import studies
from kvpolicy.testing.tables import stand_in_tables

GOOD = """\
schema_version: 1
kind: study
study: demo
base: rkv
design: one-at-a-time
axes:
  mixer.weight: [0.1, 0.3]
  importance: [key_norm, {use: window_attention, observe: 16}]
  policy: [snapkv, {extends: rkv, policy: pinned, protect: {prompt: true}}]
conditions:
  budget: [{trace: 0.2}, 256]
models: [smollm2]
datasets:
  - {use: generator, family: prompt-recall, level: short}
  - math-500
  - {use: text, path: a.txt}
quick: {samples: 4, conditions: {budget: [128]}}
"""

WRONG = {
    "an axis whose parameter does not exist": (
        ("mixer.weight", "mixer.wieght"),
        "s.yaml:7:18: axes.mixer.wieght.0: 'linear' has no such parameter. Did you mean 'weight'?",
    ),
    "an axis whose field does not exist": (
        ("mixer.weight", "mixr.weight"),
        "s.yaml:7:17: axes.mixr.weight.0: there is no field 'mixr'. Did you mean 'mixer'?",
    ),
    "a value out of range": (
        ("[0.1, 0.3]", "[0.1, 3]"),
        "s.yaml:7:23: axes.mixer.weight.1: should be less than or equal",
    ),
    "a value twice": (
        ("[0.1, 0.3]", "[0.1, 0.1]"),
        "s.yaml:7:23: axes.mixer.weight.1: 0.1 is there twice; remove one.",
    ),
    "an axis without values": (("[0.1, 0.3]", "[]"), "s.yaml:7:3: axes.mixer.weight: has no value;"),
    "an axis that is no list": (
        ("[0.1, 0.3]", "0.1"),
        "s.yaml:7:3: axes.mixer.weight: should be a list of values, got 0.1.",
    ),
    "an unknown policy": (
        ("snapkv", "snpkv"),
        "s.yaml:9:12: axes.policy.0: unknown policy 'snpkv'. Did you mean 'snapkv'?",
    ),
    "an unknown base": (("base: rkv", "base: rvk"), "s.yaml:4:1: base: unknown policy 'rvk'. Did you mean 'rkv'?"),
    "a wrong inline policy": (
        ("{prompt: true}", "{promt: true}"),
        "s.yaml:9:61: protect.promt: unknown protection 'promt'. Did you mean 'prompt'?",
    ),
    "a budget below the protection": (
        ("256]", "4]"),
        "s.yaml:11:26: conditions.budget.1: 4 entries are fewer than the 12 that are protected (sinks 4, recent 8);",
    ),
    "a share above 1": (
        ("trace: 0.2", "trace: 2"),
        "s.yaml:11:13: conditions.budget.0.trace: should be a number above 0",
    ),
    "an unknown dataset": (
        ("math-500", "math-501"),
        "s.yaml:15:5: datasets.1: there is no dataset 'math-501'. Did you",
    ),
    "an unknown field of a dataset": (
        ("family:", "famly:"),
        "s.yaml:14:22: datasets.0.famly: 'generator' has no such field. Did you mean 'family'?",
    ),
    "a model that the study has not": (
        ("level: short}", "level: short, models: [smolm2]}"),
        "s.yaml:14:68: datasets.0.models.0: 'smolm2' is not among the study's models. Did you mean 'smollm2'?",
    ),
    "an unknown level": (
        ("short}", "shrt}"),
        "s.yaml:14:45: datasets.0.level: should be 'short', 'medium' or 'long', got 'shrt'.",
    ),
    "an unknown field": (("design:", "desing:"), "s.yaml:5:1: desing: there is no such field. Did you mean 'design'?"),
    "an unknown design": (
        ("one-at", "two-at"),
        "s.yaml:5:1: design: should be 'grid', 'one-at-a-time' or 'paired', got",
    ),
    "an unknown field of quick": (
        ("samples: 4", "smples: 4"),
        "s.yaml:17:9: quick.smples: cannot be changed here. Did you",
    ),
    "a wrong value in quick": (
        ("[128]", "[2]"),
        "s.yaml:17:43: quick.conditions.budget.0: 2 entries are fewer than the 12",
    ),
    "another kind of file": (("kind: study\n", ""), "s.yaml:1:1: kind: is missing; a study file says `kind: study`."),
    "another version": (("version: 1", "version: 2"), "s.yaml:1:1: schema_version: 2 is not known here;"),
    "no models": (("models: [smollm2]", "samples: 3"), "s.yaml:1:1: models: is missing; every study says its models."),
    "models that are no list": (("[smollm2]", "smollm2"), "s.yaml:12:1: models: should be a list of names or folders,"),
    "an unknown metric": (
        ("models:", "metrics: [exct]\nmodels:"),
        "s.yaml:12:11: metrics.0: there is no metric 'exct'. Did you",
    ),
    "an unknown setting": (
        ("models:", "sampling: {temp: 1}\nmodels:"),
        "s.yaml:12:12: sampling.temp: sampling has no such",
    ),
    "a baseline that is no variant": (
        ("models:", "compare_to: pined\nmodels:"),
        "s.yaml:12:1: compare_to: there is no variant 'pined'. Did you mean 'pinned'?",
    ),
    "an unused base": (
        ("one-at-a-time", "grid"),
        "s.yaml:4:1: base: is not used, because `policy` names whole policies;",
    ),
    "an axis that is a condition too": (
        ("  budget: [", "  mixer.weight: [0.2]\n  budget: ["),
        "s.yaml:11:3: conditions.mixer.weight: is among",
    ),
    "an empty file": (
        (GOOD, ""),
        "s.yaml: is empty; write at least schema_version, kind, study, base, axes and datasets.",
    ),
    "a list": ((GOOD, "- a\n"), "s.yaml:1:1: is a list; a study file is a mapping of `field: value` lines."),
    "two labels": (
        ("  - math-500", "  - math-500\n  - math-500"),
        "s.yaml:16:5: datasets.2: 'math-500' is there twice; give one",
    ),
    "unequal pairs": (
        ("one-at-a-time\naxes:\n  mixer.weight: [0.1, 0.3]", "paired\naxes:\n  mixer.weight: [0.3]"),
        "s.yaml:4:1: base: is not used",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_errors_name_the_place_and_the_mend(change, message):
    old, new = change
    assert old in GOOD
    with pytest.raises(SpecError) as caught:
        StudySpec.from_yaml(GOOD.replace(old, new, 1), "s.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_all_mistakes_of_a_study_are_named_in_the_order_of_lines():
    text = """\
schema_version: 2
kind: study
study: My Study
base: {extends: rkv, mixer: {weight: 3}, phase: x}
axes:
  budget: [64, 64]
  policy: [rvk, {extends: rkv, triger: 3}]
models: []
datasets:
  - gsm9k
  - {use: needle, lenght: 3, samples: many}
  - {use: generator, famly: trace-recall, level: low, samples: 0}
samples: 0
metric: [kl]
sampling: {temp: 1}
"""
    with pytest.raises(SpecError) as caught:
        StudySpec.from_yaml(text, "s.yaml")
    assert [" ".join(problem.split(": ")[:2]) for problem in caught.value.problems] == [
        "s.yaml:1:1 schema_version",
        "s.yaml:3:1 study",
        "s.yaml:4:30 mixer.weight",
        "s.yaml:4:42 phase",
        "s.yaml:6:16 axes.budget.1",
        "s.yaml:7:12 axes.policy.0",
        "s.yaml:7:32 triger",
        "s.yaml:8:1 models",
        "s.yaml:10:5 datasets.0",
        "s.yaml:11:19 datasets.1.lenght",
        "s.yaml:11:30 datasets.1.samples",
        "s.yaml:12:22 datasets.2.famly",  # not that `family` is missing too
        "s.yaml:12:43 datasets.2.level",
        "s.yaml:12:55 datasets.2.samples",
        "s.yaml:13:1 samples",
        "s.yaml:14:1 metric",
        "s.yaml:15:12 sampling.temp",
    ]


def test_what_it_says():
    spec = StudySpec.from_yaml(GOOD)
    names = [
        "rkv",
        "mixer.weight=0.3",
        "importance=key_norm",
        "importance=window_attention(observe=16)",
        "snapkv",
        "pinned",
    ]
    assert [v.label for v in spec.variants()] == [
        f"{n} | budget={b}" for b in ("20% of the trace", "256") for n in names
    ]
    assert spec.variants()[-1].policy == kvpolicy.load("rkv", 256, protect__prompt=True, policy="pinned")
    quick = spec.quickened()
    assert quick.samples == 4
    assert [v.label for v in quick.variants()] == names  # a single budget is in no label
    assert {v.policy.budget.tokens for v in quick.variants()} == {128}
    assert quick.axes == spec.axes


def test_without_quick_there_are_eight_problems_and_one_seed():
    spec = StudySpec(study="s", base="rkv", models=["smollm2"], datasets=["gsm8k"], seeds=[5, 6])
    assert (spec.quickened().samples, spec.quickened().seeds) == (8, (5,))


@given(studies())
def test_yaml_and_data_say_the_same(spec):
    with stand_in_tables():
        assert StudySpec.from_yaml(spec.to_yaml()) == spec
        assert StudySpec(**spec.to_data()) == spec
        labels = [variant.label for variant in spec.variants()]
        assert len(labels) == len(set(labels)) > 0
        assert spec.quickened().quick is None


def test_paths_are_relative_to_the_file(folder):
    (folder / "p").mkdir()
    (folder / "p" / "mine.yaml").write_text(kvpolicy.load("rkv").replace("policy", "mine").to_yaml())
    text = GOOD.replace("base: rkv", "base: p/mine.yaml").replace("[smollm2]", "[./model]")
    (folder / "s.yaml").write_text(text)
    spec = find_study(folder / "s.yaml")
    assert spec.base.policy == "mine"
    assert spec.models == (str(folder / "model"),)
    assert spec.datasets[2].path == str(folder / "a.txt")


def test_a_study_is_found_by_its_registered_name(folder):
    catalog = installed.load_catalog()
    catalog.register_study("demo", GOOD)
    with installed.using(catalog):
        assert find_study("demo") == StudySpec.from_yaml(GOOD)
        with pytest.raises(SpecError, match=r"^unknown study 'demmo'\. Did you mean 'demo'\?"):
            find_study("demmo")
    with pytest.raises(SpecError, match="there is no such file"):
        find_study(folder / "none.yaml")


def test_a_model_is_given_its_datasets_only():
    fields = {"study": "s", "base": "rkv", "models": ["a", "b"]}
    needle, text = {"use": "needle", "models": ["a"]}, {"use": "text", "path": "t.txt", "models": ["a"]}
    with pytest.raises(SpecError, match=r"^models\.1: 'b' is given no dataset; remove it, or give it one\.$"):
        StudySpec(**fields, datasets=[needle, text])
    spec = StudySpec(**fields, datasets=[needle, {**text, "models": ["b"]}])
    assert StudySpec.from_yaml(spec.to_yaml()) == spec


@pytest.mark.parametrize("entry", kvpolicy.catalog().studies(), ids=lambda entry: entry.name)
def test_every_registered_study_is_valid_and_small_when_quick(entry):
    spec = find_study(entry.name)
    assert spec.study == entry.name
    assert spec.description.endswith((".", "?"))
    assert StudySpec.from_yaml(spec.to_yaml()) == spec
    quick = spec.quickened()
    assert len(quick.variants()) * len(quick.datasets) * quick.samples * len(quick.seeds) <= 400


def test_an_axis_that_cannot_be_read_is_not_missing(tmp_path):
    from kvpolicy.errors import SpecError
    from kvpolicy.study.spec import StudySpec

    text = (
        "schema_version: 1\nkind: study\nstudy: s\nmodels: [reasoner]\ndatasets: [gsm8k]\n"
        "axes:\n  policy: [{extends: nowhere, policy: mine}]\n"
    )
    with pytest.raises(SpecError, match="unknown policy 'nowhere'") as caught:
        StudySpec.from_yaml(text)
    assert "base" not in str(caught.value)


def test_a_list_is_not_too_short_for_what_could_not_be_read():
    text = "schema_version: 1\nkind: study\nstudy: s\nbase: rkv\naxes: {budget: [64, 128]}\ndatasets: [{use: needle}]\n"
    with pytest.raises(SpecError, match=r"models\.0: should be a valid string") as caught:
        StudySpec.from_yaml(text + "models: [[reasoner, smollm2]]\n")
    assert "more problem" not in str(caught.value)
    with pytest.raises(SpecError, match=r"models: should have at least 1 of them, got \[\]\."):
        StudySpec.from_yaml(text + "models: []\n")


def test_a_file_of_the_other_kind_is_refused_in_one_sentence():
    registry = Path(kvpolicy_registry.__file__).parent
    with pytest.raises(SpecError, match="this looks like a policy file") as caught:
        StudySpec.from_file(registry / "policies" / "rkv.yaml")
    assert "more problem" not in str(caught.value)
    with pytest.raises(SpecError, match="says that this is a study, which `kvpolicy study` takes") as caught:
        kvpolicy.PolicySpec.from_file(registry / "studies" / "scope.yaml")
    assert "more problem" not in str(caught.value)
