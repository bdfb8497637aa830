from __future__ import annotations

import importlib.util
import re
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "results_tables.py"


def test_the_tables_of_the_page_of_results_are_the_published_numbers():
    spec = importlib.util.spec_from_file_location("results_tables_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.PAGE.read_text(encoding="utf-8")
    assert len(script.TABLE.findall(text)) > 4
    assert script.written(text) == text, "run python -P scripts/results_tables.py"
    (table, *_) = re.findall(r"<!-- table: ruler-1k .*?<!-- end -->", text, re.DOTALL)
    spoilt = table.replace("| `full` | 55 ", "| `full` | 56 ")
    assert spoilt != table
    assert script.written(spoilt) == table
