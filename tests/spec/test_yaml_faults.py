"""What YAML allows and a file here may not have is named together with all else that is wrong with the file."""

from __future__ import annotations

import pytest

from kvpolicy import PolicySpec, SpecError
from kvpolicy.cli.named import kind_of_file
from kvpolicy.spec import yaml_text
from kvpolicy.study.spec import StudySpec

HEAD = "schema_version: 1\npolicy: p\n"
REST = "trigger: {every: 8}\nimportance: key_norm\n"
STUDY = "schema_version: 1\nkind: study\nstudy: s\nbase: rkv\nmodels: [smollm2]\n"


def said(text, kind=PolicySpec):
    """Return line, column and the first words of every problem."""
    with pytest.raises(SpecError) as caught:
        kind.from_yaml(text, "f.yaml")
    assert all(problem.startswith("f.yaml:") for problem in caught.value.problems)
    return [" ".join(problem.removeprefix("f.yaml:").split()[:3]) for problem in caught.value.problems]


def test_faults_and_mistakes_come_in_the_order_of_lines():
    text = (
        f"{HEAD}budget: !!int '4'\ntrigger: {{every: 8, every: 9}}\nimportance: &a key_nrm\nmixer: *a\ncolour: red\n"
        f"3: x\nprotect: {{recent: {'9' * 200}}}\npaper: !x y\n"
    )
    assert said(text) == [
        "3:9: tags such",
        "4:21: 'every' is",
        "5:1: importance: unknown",
        "5:13: anchors such",
        "6:8: aliases such",
        "7:1: colour: there",
        "8:1: the key",
        "9:19: 9999999999... is",
        "10:8: tags such",
    ]


def test_every_tab_is_named_and_what_stands_behind_it():
    text = f"{HEAD}budget:\n\ttokens: 0\ntrigger:\n\tevery: 8\nimportance: key_nrm\n"
    assert said(text) == ["4:1: not valid", "4:2: budget.tokens: 0", "6:1: not valid", "7:1: importance: unknown"]


def test_what_may_follow_from_a_tab_is_not_said():
    assert said(f"{HEAD}protect:\n  sinks: 4\n\trecent: 8\n{REST}") == ["5:1: not valid"]
    assert said(f"{HEAD}budget: !x 4\n\ttrigger: &a x\n") == ["3:9: tags such", "4:1: not valid"]


def test_what_stands_before_a_text_that_cannot_be_read_on_is_named():
    assert said("a: *x\nb: !y z\nc: [1\nd: 3") == ["1:4: aliases such", "2:4: tags such", "4:2: not valid"]


def test_a_second_document_does_not_hide_mistakes_of_the_first():
    assert said(f"{HEAD}budget: 0\n{REST}---\nx: 1\n") == ["3:1: budget.tokens: 0", "6:1: a policy"]


@pytest.mark.parametrize("tagged", ["!!str 5", "!!int '5'", "!!set {a, b}", "*nothing", "9" * 101, "{1: 2}"])
def test_nothing_follows_from_a_value_that_is_not_known(tagged):
    found = said(f"{HEAD}budget: {tagged}\n{REST}")
    assert len(found) == 1
    assert found[0].startswith("3:")


def test_without_its_base_nothing_is_missing():
    assert said(f"{HEAD}extends: *x\nbudget: 0\n") == ["3:10: aliases such", "4:1: budget.tokens: 0"]


def test_faults_of_a_base_come_with_those_of_the_file(tmp_path):
    (tmp_path / "base.yaml").write_text(f"{HEAD}budget: &b 5\npaper: !x y\n{REST}")
    (tmp_path / "f.yaml").write_text(f"{HEAD}extends: base.yaml\nbudget: 0\n")
    with pytest.raises(SpecError) as caught:
        PolicySpec.from_file(tmp_path / "f.yaml")
    places = [problem.removeprefix(f"{tmp_path}/").split(" ")[0] for problem in caught.value.problems]
    assert places == ["base.yaml:3:9:", "base.yaml:4:8:", "f.yaml:4:1:"]


def test_no_more_are_named_than_anybody_reads():
    assert len(said("".join(f"k{i}: *x\n" for i in range(1000)))) == yaml_text.MAX_FAULTS
    assert len(said("a:\n" + "".join(f"\tk{i}: 1\n" for i in range(1000)))) == yaml_text.MAX_FAULTS


def test_parse_takes_no_file_with_a_fault():
    with pytest.raises(SpecError, match=r"^f:1:4: anchors .* \(1 more problem after this one\.\)$"):
        yaml_text.parse("a: &x 1\nb: &y 2\n", "f")


def test_parts_that_do_not_fit_are_all_named_whatever_else_is_wrong():
    text = (
        f"{HEAD}budget: 4\ncolour: red\ntrigger: each_step\nprotect: {{recent: 8}}\nimportance: window_attention\n"
        "allocator: adaptive_heads\nselector: {use: top_k, scope: model}\npost: [rerotate]\n"
    )
    assert said(text) == [
        "3:1: budget: 4",
        "4:1: colour: there",
        "9:24: selector.scope: 'model'",
        "10:1: post: re-rotated",
    ]


def test_a_study_names_faults_values_and_what_is_compared():
    text = (
        f"{STUDY}datasets: [{{use: needle, words: !!int 20}}]\n"
        "axes: {budget: [1, 2, 64], trigger.interval: [0, 16], mixer.weight: [0.1, 7]}\nmetrics: [exact, exact, foo]\n"
    )
    assert said(text, StudySpec) == [
        "6:33: tags such",
        "7:17: axes.budget.0: 1",
        "7:20: axes.budget.1: 2",
        "7:47: axes.trigger.interval.0: should",
        "7:75: axes.mixer.weight.1: should",
        "8:18: metrics.1: 'exact'",
        "8:25: metrics.2: there",
    ]


def test_a_study_names_what_is_wrong_with_quick_beside_it():
    text = (
        f"{STUDY}datasets: [{{use: needle, words: 20}}]\naxes: {{budget: [64]}}\ncompare_to: x\n"
        "quick: {foo: 1, bar: 2, samples: 0}\n"
    )
    assert said(text, StudySpec) == [
        "8:1: compare_to: there",
        "9:9: quick.foo: cannot",
        "9:17: quick.bar: cannot",
        "9:25: quick.samples: should",
    ]


@pytest.mark.parametrize("end", ["models: !x y\n", "\tmodels: 3\n", "models: [\n"])
def test_a_study_with_a_fault_is_still_taken_for_a_study(tmp_path, end):
    (tmp_path / "s.yaml").write_text(f"schema_version: 1\nkind: study\n{end}")
    assert kind_of_file(tmp_path / "s.yaml") == "study"
    (tmp_path / "p.yaml").write_text(f"schema_version: 1\npolicy: p\n{end}")
    assert kind_of_file(tmp_path / "p.yaml") == "policy"


def test_names_in_which_lines_end_leave_a_sentence_one_line():
    models = STUDY.replace("[smollm2]", '[reasoner, "a\\nb"]')
    text = models + "axes: {budget: [64]}\ndatasets: [{use: needle, words: 20, models: [other]}]\n"
    with pytest.raises(SpecError, match=r"'other' is not among the study's models\. Models: reasoner, a b\.") as caught:
        StudySpec.from_yaml(text, "f.yaml")
    assert all(len(problem.splitlines()) == 1 for problem in caught.value.problems)
