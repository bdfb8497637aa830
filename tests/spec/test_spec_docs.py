"""docs/spec.md is true: its files load, its Python runs, its errors are what kvpolicy says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvpolicy
from kvpolicy import SpecError
from kvpolicy.spec import forms

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "spec.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_every_block_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope, errors = {}, 0
    for language, text in BLOCKS:
        if language == "text":  # what a program prints
            continue
        if language == "python":
            exec(compile(text, "docs/spec.md", "exec"), scope)
            continue
        path = Path(re.match(r"# file: (\S+)\n", text)[1])
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        expected = re.search(r"^# error: (.*)\n", text, flags=re.MULTILINE)
        if expected is None:
            kvpolicy.load(path)
            continue
        errors += 1
        with pytest.raises(SpecError) as caught:
            kvpolicy.load(path)
        assert str(caught.value) == expected[1]
    assert [language for language, _ in BLOCKS].count("python") >= 3
    assert errors >= 2
    assert scope["largest_values"].build().importance is not None


def test_every_field_is_in_the_table():
    for field in (*forms.FIELDS, "extends"):
        assert re.search(rf"^\| .*`{field}`.* \|.*\|.*\|$", PAGE, flags=re.MULTILINE), field
