"""The table of docs/kernels.md: every bundled policy, and rows that are what a policy asks for today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("kernel_table_script", ROOT / "scripts" / "kernel_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(script):
    text = script.PAGE.read_text(encoding="utf-8").partition(script.FIRST)[2].partition(script.LAST)[0]
    return {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}


def test_every_policy_has_a_row(script):
    assert tuple(rows(script)) == script.POLICIES


@pytest.mark.parametrize("name", ["rkv-paper", "rkv-density"])
def test_rows_are_current(script, name):
    assert rows(script)[name] == script.row(name), "run python -P scripts/kernel_table.py"


@pytest.mark.slow
def test_all_rows_are_current(script):
    assert rows(script) == {name: script.row(name) for name in rows(script)}


def test_the_table_of_compiled_kernels_is_current(script):
    text = script.PAGE.read_text(encoding="utf-8").partition(script.SECOND)[2].partition(script.LAST)[0]
    assert text == script.resources(), "run python -P scripts/kernel_table.py"


def test_the_noted_calls_are_the_operations_of_the_policy(script):
    ops = {call["op"] for call in script.calls_of("rkv-density").values()}
    assert ops == {"window_importance", "key_density", "top_k", "compact"}


def test_a_call_without_a_kernel_is_named(script):
    few, many = ({"op": "window_importance", "observed": n, "options": {}} for n in (8, 33))
    wide, odd = script.Family("wide", 256, 4, softcap=50.0, sinks=True), script.Family("odd", 48, 4)
    assert script.reason(few, wide) is None
    assert script.reason(many, wide) == "33 observed queries (at most 32)"
    assert script.reason(few, odd).startswith("the head dim is 48")
    ragged = {"op": "ragged_attention", "options": {}}
    assert script.reason(ragged, wide) is None
    assert script.reason(ragged, odd).startswith("the head dim is 48")
