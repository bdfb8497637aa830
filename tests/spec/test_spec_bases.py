"""Mistakes across files: in a base, between a base and what extends it, in circles and chains of bases."""

from __future__ import annotations

import re

import pytest

import kvpolicy
from kvpolicy import PolicySpec, SpecError
from kvsupport.spec_good import GOOD


def test_an_error_in_the_base_names_the_base(tmp_path):
    base = tmp_path / "base.yaml"
    top = tmp_path / "top.yaml"
    base.write_text(GOOD.replace("weight: 0.1", "weight: 2"))
    top.write_text("schema_version: 1\npolicy: top\nextends: base.yaml\nbudget: 100\n")
    with pytest.raises(SpecError, match=re.escape(f"{base}:10:22: mixer.weight: ")):
        PolicySpec.from_file(top)
    top.write_text("schema_version: 1\npolicy: top\nextends: base.yaml\nmixer:\n  weight: 3\n")
    with pytest.raises(SpecError, match=re.escape(f"{top}:5:3: mixer.weight: ")):
        PolicySpec.from_file(top)
    # The base's parameter is gone with its component, so its line must not be blamed.
    base.write_text(GOOD.replace("observe: 8", "observe: 8\n  smooth: 7"))
    top.write_text("schema_version: 1\npolicy: top\nextends: base.yaml\nimportance: {use: random, smooth: 7}\n")
    with pytest.raises(SpecError, match=re.escape(f"{top}:4:27: importance.smooth: ")):
        PolicySpec.from_file(top)


def test_a_misfit_between_files_names_the_budget_line(tmp_path):
    top = tmp_path / "top.yaml"
    top.write_text("schema_version: 1\npolicy: top\nextends: rkv\nbudget: 10\n")
    with pytest.raises(SpecError, match=re.escape(f"{top}:4:1: budget: 10 entries are fewer than the 12")):
        PolicySpec.from_file(top)


def test_circles_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, base in (("a", "b"), ("b", "sub/../a"), ("own", "own")):
        (tmp_path / f"{name}.yaml").write_text(f"schema_version: 1\npolicy: {name}\nextends: {base}.yaml\n")
    (tmp_path / "sub").mkdir()
    with pytest.raises(SpecError, match=r"^b\.yaml:3:1: extends: makes a circle \(a\.yaml -> b\.yaml -> .*a\.yaml\)"):
        kvpolicy.load("a.yaml")
    with pytest.raises(SpecError, match="makes a circle"):
        kvpolicy.load("own.yaml")


def chain(folder, length):
    (folder / "0.yaml").write_text(GOOD)
    for i in range(1, length):
        (folder / f"{i}.yaml").write_text(
            f"schema_version: 1\npolicy: p{i}\nextends: {i - 1}.yaml\nbudget: {100 + i}\n"
        )
    return folder / f"{length - 1}.yaml"


def test_long_chains_are_fine_and_endless_ones_are_refused(tmp_path):
    assert PolicySpec.from_file(chain(tmp_path, 30)).budget.tokens == 129
    with pytest.raises(SpecError, match=r"467\.yaml:3:1: extends: leads through more than 32 files; write"):
        PolicySpec.from_file(chain(tmp_path, 500))
