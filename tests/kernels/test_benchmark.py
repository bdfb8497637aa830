"""`benchmarks/kernels.py` needs a GPU to say anything about speed, but all that it does can be tried here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from kvpolicy import ops

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.py"
OPERATIONS = {"window_importance", "redundancy", "key_density", "top_k", "compact keys", "ragged_attention"}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    threads = torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("kvpolicy_benchmark_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


def test_every_case_runs_and_counts_its_work(script, device):
    cases = script.cases(1, 2, 144, 16, device)
    assert set(cases) == OPERATIONS
    for case in cases.values():
        case.form("triton", "eager")()
        assert case.moved > 0
        assert case.flops >= 0


def test_the_literal_forms_are_the_same_scores(script, device):
    cases = script.cases(2, 2, 144, 16, device)
    with ops.using_backend("torch"):
        keys, valid = cases["key_density"].arguments
        got = ops.key_density(keys, valid, bandwidth=script.BANDWIDTH)
        torch.testing.assert_close(got, torch.stack(cases["key_density"].literal()), atol=1e-6, rtol=1e-4)
        got = ops.redundancy(keys, valid, index_zero=True)
        torch.testing.assert_close(got, torch.stack(cases["redundancy"].literal()), atol=1e-5, rtol=1e-2)


def test_a_form_that_fails_is_a_line_and_the_others_are_measured(script, tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(ops, "top_k", broken)
    broken.__wrapped__ = broken
    monkeypatch.setattr(script, "FORMS", ("torch",))
    assert script.main(["--quick", "--json", str(tmp_path / "kernels.json")]) == 1
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    outcomes = {row["operation"]: row["outcome"] for row in rows}
    assert outcomes == dict.fromkeys(OPERATIONS, "measured") | {"top_k": "failed: RuntimeError: no such kernel"}
    assert all(row["of_copy"] > 0 for row in rows if row["outcome"] == "measured")
    assert "no such kernel" in capsys.readouterr().out


def test_it_refuses_without_a_gpu(script, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "benchmarks/kernels.py measures on a CUDA or HIP device, and there is none here.\n"
