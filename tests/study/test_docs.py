"""docs/studies.md is true: its files load, its Python runs, its errors are what kvpolicy says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvpolicy import SpecError
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.sources import SOURCES
from kvpolicy.study.spec import FIELDS, find_study

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")


def test_every_file_and_error_is_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(yaml|python)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    errors = 0
    for language, text in blocks:
        if language == "python":
            exec(compile(text, "docs/studies.md", "exec"), {})
            continue
        path = Path(re.match(r"# file: (\S+)\n", text)[1])
        path.write_text(text, encoding="utf-8")
        expected = re.search(r"^# error: (.*)\n", text, flags=re.MULTILINE)
        if expected is None:
            assert find_study(path).quickened().samples == 8
            continue
        errors += 1
        with pytest.raises(SpecError) as caught:
            find_study(path)
        assert str(caught.value) == expected[1]
    assert errors == 2


def test_all_fields_metrics_and_datasets_are_there():
    for name in (*FIELDS, *METRICS, *SOURCES):
        assert re.search(rf"^\| [^|]*`{name}`", PAGE, flags=re.MULTILINE), name
    for kind in SOURCES.values():
        for field in kind.model_fields:
            assert f"`{field}`" in PAGE or f"`{field}: " in PAGE, field
