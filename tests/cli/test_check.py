"""`kvpolicy check`: what it finds, what it prints, how it ends."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from kvpolicy.cli import main
from kvpolicy_plugins.importance import key_norm as importance
from kvpolicy_plugins.triggers import every


def run(capsys, *arguments):
    code = main(["check", *arguments])
    out, err = capsys.readouterr()
    return code, out, " ".join(err.replace("│", " ").split())


def test_a_component_a_class_and_a_policy_file(capsys, tmp_path):
    import kvpolicy

    file = tmp_path / "mine.yaml"
    file.write_text(kvpolicy.load("knorm").replace("policy", "mine").to_yaml())
    code, out, _ = run(capsys, "importance.none", str(file), "uniform", "--law", "row_alone")
    assert code == 0
    assert "row_alone" in out
    assert "importance.none" in out
    assert "3 checked against 1 laws: 3 passed, 0 failed" in out


def test_laws_stand_in_full_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = ("importance.accumulated_attention", "redundancy.key_coverage")
    code, out, _ = run(capsys, *names, "--law", "permuting_entries", "--law", "older_queries_ignored", "--jobs", "1")
    assert code == 0
    assert "…" not in out
    assert "1 importance.accumulated_attention\n2 redundancy.key_coverage\n" in out
    assert "older_queries_ignored" in out
    assert "it looks at no queries" in out


def test_a_name_stands_for_all_that_is_called_so(capsys):
    code, out, _ = run(capsys, "random", "--law", "permuting_rows")
    assert code == 0
    assert "importance.random" in out
    assert "2 checked" in out


def test_a_failure_is_printed_with_its_test(capsys):
    code, out, _ = run(capsys, "kvsupport.mutants.scorers:BySlot", "--law", "left_padding", "--law", "row_alone")
    assert code == 1
    assert "BySlot breaks the law left_padding" in out
    assert "layers[0].view.keys: float32" in out
    assert "def test_left_padding():" in out
    assert "2 failed" in out


def test_a_package(capsys):
    code, out, _ = run(capsys, "kvpolicy", "--law", "trigger_is_pure", "--law", "exact_total")
    assert code == 0
    assert "trigger.every" in out


def test_what_is_named_twice_is_checked_once(capsys):
    code, out, _ = run(capsys, "key_norm", "importance.key_norm", "--law", "row_alone")
    assert code == 0
    assert "1 checked against 1 laws: 1 passed" in out


def test_classes_of_one_name_are_told_apart_by_their_modules(capsys, monkeypatch):
    class Thing(importance.KeyNorm):
        """A scorer."""

    class Other(every.Every):
        """A trigger."""

    for module, thing in (("one_module", Thing), ("other_module", Other)):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(Thing=thing))
    names = ("one_module:Thing", "other_module:Thing")
    code, out, _ = run(capsys, *names, "--law", "trigger_is_pure", "--law", "row_alone", "--jobs", "1")
    assert code == 0
    assert "2 checked against 2 laws: 2 passed" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "name a policy, a component or a package, or write --all"),
        (("rkv", "--all"), "name a policy, a component or a package, or write --all"),
        (("rkw",), "Did you mean 'rkv'?"),
        (("KnormPress",), "take the policy 'knorm'"),
        (("rkv", "--profile", "slow"), "'slow' is not a profile; write brief, quick or thorough"),
        (("rkv", "--law", "nothing"), "there is no law 'nothing'. The laws are "),
        (("rkv", "--law", "row_allone"), "there is no law 'row_allone'. Did you mean 'row_alone'?"),
        (("rkv", "--law", "trigger_is_pure"), "trigger_is_pure is about trigger, and nothing of that is checked"),
        (("no_such_module:Thing",), "'no_such_module:Thing' cannot be checked: No module named"),
        (("kvpolicy.contracts.components:Trigger",), "Trigger is abstract"),
    ],
)
def test_wrong_usage_ends_with_2(capsys, arguments, told):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert told in err


def test_without_the_laws_library_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    assert main(["check", "rkv"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("need hypothesis; install it with: pip install 'kvpolicy[test]'.\n")
    assert captured.err.count("\n") == 1
