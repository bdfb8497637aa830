"""Results, counterexamples, exceptions and packages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import kvpolicy
import kvsupport
from kvpolicy.cli.checking import _report
from kvpolicy.contracts.components import ImportanceScorer, Trigger
from kvpolicy.errors import KVPolicyError, SpecError, UnsupportedError
from kvpolicy.testing import LAWS, check_component, check_package, check_policy
from kvpolicy.testing.checking import check, subject_of, subjects_of_package
from kvpolicy.testing.laws._base import Law, decided
from kvpolicy.testing.laws._draws import one_case
from kvsupport.mutants import parts, scorers

PLUGIN = ["-p", "no:cacheprovider"]


def checked(subject, *laws):
    return check(subject_of(subject), laws=[LAWS[law] for law in laws], shrink=False)


def failed(results):
    return {r.law: r for r in results if r.status == "failed"}


def test_a_profile_that_there_is_not_is_named():
    with pytest.raises(KVPolicyError, match=r"profile: 'fast' is none; write brief, quick, thorough\."):
        check_component(kvpolicy.catalog().get("mixer", "importance_only"), profile="fast")


def test_a_good_component_passes_and_says_what_does_not_apply():
    results = check_component(kvpolicy.catalog().get("mixer", "importance_only"))
    assert not failed(results)
    [excused] = [r for r in results if r.status == "not applicable"]
    assert (excused.law, excused.reason) == ("weight_limits", "it has no parameter `weight`")


def test_an_instance_is_checked_as_it_is():
    results = check_component(kvpolicy.catalog().get("redundancy", "key_cosine")(spare="own"))
    assert not failed(results)
    [excused] = [r for r in results if r.law == "newest_twin_spared"]
    assert "equations 5 and 6" in excused.reason


@pytest.mark.parametrize(
    ("subject", "law"),
    [
        (scorers.FirstRowOnly, "row_alone"),
        (scorers.HalfPrecision, "computed_in_fp32"),
        (scorers.OldestSpared, "newest_twin_spared"),
        (scorers.SwappedWeight, "weight_limits"),
        (parts.Unsorted, "indices_increase"),
        (parts.FloorRounding, "exact_total"),
        (parts.FirstSlots, "left_padding"),
        (parts.OneStepLate, "buffer_is_kept"),
        (parts.PositionsBySlot, "positions_are_contiguous"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_failure_can_be_pasted(subject, law):
    [result] = check(subject_of(subject), laws=[LAWS[law]])
    assert result.status == "failed"
    assert result.failure.example
    with pytest.raises(AssertionError) as told:
        result.expect()
    for part in (LAWS[law].reason, result.failure.message, "def test_"):
        assert part in str(told.value)
    space = {}
    exec(compile(result.failure.test, "<pasted>", "exec"), space)
    with pytest.raises(AssertionError) as again:
        space[f"test_{law}"]()
    assert str(again.value).strip() == result.failure.message


def test_a_failing_policy_can_be_pasted_with_its_steps(monkeypatch):
    from kvpolicy.cache.queries.log import QueryLog

    monkeypatch.setattr(QueryLog, "crop", lambda self, columns: None)
    [result] = check(subject_of("rkv"), laws=[LAWS["state_moves_with_slots"]])
    space = {}
    exec(compile(result.failure.test, "<pasted>", "exec"), space)
    with pytest.raises(AssertionError, match="shows the queries of positions"):
        space["test_state_moves_with_slots"]()
    assert len(result.failure.test.splitlines()) < 80
    monkeypatch.undo()
    space["test_state_moves_with_slots"]()


def test_examples_shrink():
    [result] = check(subject_of(scorers.FirstHeadOnly), laws=[LAWS["permuting_heads"]])
    assert "view.keys: float32 [1, 2, 1, 4]" in result.failure.example


def test_quick_is_the_same_every_time():
    pair = [check(subject_of(scorers.CoarseRounding), laws=[LAWS["row_alone"]], shrink=False) for _ in range(2)]
    told = [[(r.status, r.failure and r.failure.test) for r in results] for results in pair]
    assert told[0] == told[1]


def test_an_undeclared_exception_fails_and_a_declared_one_does_not():
    class BySlot(scorers.BySlot):
        pass

    class Excused(scorers.BySlot):
        laws_not_applicable: ClassVar = {"left_padding": "it counts slots on purpose"}

    laws = ("left_padding", "row_alone")
    assert list(failed(checked(BySlot, *laws))) == list(laws)
    results = {r.law: r for r in checked(Excused, *laws)}
    assert results["left_padding"].status == "not applicable"
    assert results["left_padding"].reason == "it counts slots on purpose"
    assert results["row_alone"].status == "failed"


def test_exceptions_must_be_laws_with_reasons():
    class Wrong(scorers.BySlot):
        laws_not_applicable: ClassVar = {"left_pading": "a slip", "row_alone": " "}

    told = failed(checked(Wrong))
    assert "is no law. Did you mean 'left_padding'?" in told["left_pading"].failure.message
    assert "no reason for 'row_alone'" in told["row_alone"].failure.message


def test_a_policy_inherits_the_exceptions_of_its_components():
    results = {r.law: r for r in check(subject_of("random"), laws=[LAWS["permuting_heads"]])}
    assert results["permuting_heads"].reason == "Random: each head draws its own numbers"


def test_whatever_a_component_raises_is_a_failure():
    class Raises(ImportanceScorer):
        def score(self, view):
            raise ZeroDivisionError("oh")

    [result] = check(subject_of(Raises), laws=[LAWS["row_alone"]])
    assert result.failure.message == "ZeroDivisionError: oh"
    assert "class Raises" not in result.failure.test


def test_a_need_that_there_is_not_is_a_failure_that_names_it():
    class Looks(ImportanceScorer):
        needs: ClassVar = frozenset({"logits"})

        def score(self, view):
            return torch.zeros(view.shape)

    [result] = checked(Looks, "row_alone")
    message = result.failure.message
    assert message.startswith("while an example was drawn: UnsupportedError: needs: there is no logits; known")


def test_a_law_about_which_too_few_examples_say_anything_is_no_pass(capsys):
    def statement(subject, case):
        decided(case.view.shape == (1, 2, 7), "another shape")

    rare = Law("rare", "It is hardly ever decided.", ("importance",), statement, one_case)
    [result] = check(subject_of(kvpolicy.catalog().get("importance", "key_norm")), laws=[rare])
    assert result.status == "undecided"
    assert re.fullmatch(r"only \d of 20 examples said anything \(\d+ times another shape\)", result.reason)
    with pytest.raises(AssertionError, match="rare undecided: only"):
        result.expect()
    assert _report([result])
    assert "0 passed, 0 failed, 1 undecided" in capsys.readouterr().out


def test_a_law_that_says_nothing_about_any_example_is_undecided():
    def statement(subject, case):
        decided(False, "it is Sunday")

    never = Law("never", "It says nothing.", ("importance",), statement, one_case)
    [result] = check(subject_of(kvpolicy.catalog().get("importance", "key_norm")), laws=[never])
    assert (result.status, result.decided) == ("undecided", 0)
    assert "times it is Sunday" in result.reason


def test_exceptions_that_hang_on_parameters():
    class Choosy(scorers.BySlot):
        slots: bool = True

        def laws_excused(self):
            return {"left_padding": "it counts slots"} if self.slots else {}

    law = [LAWS["left_padding"]]
    [excused] = check(subject_of(Choosy(slots=True)), laws=law)
    assert (excused.status, excused.reason) == ("not applicable", "it counts slots")
    [held] = check(subject_of(Choosy(slots=False)), laws=law)
    [drawn] = check(subject_of(Choosy), laws=law)
    assert held.status == drawn.status == "failed"


def test_an_exception_that_only_an_instance_declares_must_be_a_law_too():
    class Wrong(scorers.BySlot):
        def laws_excused(self):
            return {"left_pading": "a slip"}

    [result] = checked(Wrong, "deterministic")
    assert "is no law. Did you mean 'left_padding'?" in result.failure.message


def test_a_component_inherits_the_exceptions_of_what_it_is_made_of():
    class Wrapper(ImportanceScorer):
        base: ImportanceScorer

        def score(self, view):
            return self.base.score(view)

    random = kvpolicy.catalog().get("importance", "random")()
    [result] = check(subject_of(Wrapper(base=random)), laws=[LAWS["permuting_heads"]])
    assert result.reason == "Random: each head draws its own numbers"


def test_abstract_classes_are_refused():
    with pytest.raises(UnsupportedError, match="Trigger is abstract; implement buffer, fires"):
        check_component(Trigger)


def test_packages():
    names = [s.name for s in subjects_of_package("kvpolicy")]
    assert "importance.key_norm" in names
    assert "rkv" in names
    with pytest.raises(KVPolicyError, match=r"package 'kvpolcy' registers no .* Did you mean 'kvpolicy'\?"):
        check_package("kvpolcy")


def test_a_policy_that_cannot_be_read_fails_alone(monkeypatch):
    load = kvpolicy.load

    def broken(name, *rest):
        if name == "rkv":
            raise SpecError("rkv.yaml:3:1: budget: it is gone.")
        return load(name, *rest)

    monkeypatch.setattr(kvpolicy, "load", broken)
    subjects = {s.name: s for s in subjects_of_package("kvpolicy")}
    assert "knorm" in subjects
    [result] = check(subjects["rkv"])
    assert (result.law, result.status) == ("can_be_read", "failed")
    assert result.failure.message == "rkv.yaml:3:1: budget: it is gone."


def test_policies_by_value_and_name():
    spec = kvpolicy.load("knorm", budget=8)
    for given in (spec, spec.build(), "knorm"):
        assert subject_of(given).what.reserved() == 0
    assert not failed(check_policy(spec.replace("trigger", "each_step")))


def run_pytest(folder, *arguments, text):
    (folder / "test_mine.py").write_text(text)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-rA", *PLUGIN, *arguments, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False).stdout


def test_four_lines_are_a_test_for_each_law(tmp_path):
    text = """from kvpolicy.testing import laws_of
from kvsupport.mutants.parts import OneStepLate

test_laws = laws_of(OneStepLate)
"""
    out = run_pytest(tmp_path, "-o", f"pythonpath={Path(kvsupport.__file__).parents[1]}", text=text)
    assert "PASSED test_mine.py::test_laws[declared_exceptions]" in out
    assert "PASSED test_mine.py::test_laws[trigger_is_pure]" in out
    assert "FAILED test_mine.py::test_laws[buffer_is_kept]" in out
    assert "OneStepLate breaks the law buffer_is_kept" in out
    assert "def test_buffer_is_kept():" in out


def test_the_plugin_adds_an_option_and_a_fixture(tmp_path):
    from importlib.metadata import entry_points

    named = any(e.value == "kvpolicy.testing.pytest_plugin" for e in entry_points(group="pytest11"))
    text = """import torch

def test_memory(poisoned_memory, pytestconfig):
    assert torch.empty(2).isnan().all()
    assert pytestconfig.getoption("--kvpolicy-profile") == "thorough"
"""
    more = [] if named else ["-p", "kvpolicy.testing.pytest_plugin"]
    out = run_pytest(tmp_path, *more, "--kvpolicy-profile=thorough", text=text)
    assert "PASSED test_mine.py::test_memory" in out


def test_without_hypothesis_one_sentence_names_the_extra(monkeypatch):
    import kvpolicy.testing as testing
    from kvpolicy.testing import _extra

    monkeypatch.setattr(_extra, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.startswith("kvpolicy.testing.") and name != _extra.__name__]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(vars(testing), "check_policy", raising=False)
    for asks in (lambda: testing.check_policy, lambda: testing.laws_of("rkv")):
        with pytest.raises(
            ImportError,
            match=r"laws and strategies need hypothesis; install it with: pip install 'kvpolicy\[test\]'\.$",
        ):
            asks()
    assert testing.poisoned_memory
