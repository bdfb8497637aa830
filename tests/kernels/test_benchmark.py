"""`benchmarks/kernels.py` needs a GPU to say anything, but what it calls can be tried here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from kvpolicy import ops

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("kvpolicy_benchmark_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_case_runs_and_counts_its_work(script, device):
    cases = script.cases(1, 2, 144, 16, device)
    assert set(cases) == {"window_importance", "redundancy", "top_k", "compact keys", "ragged_attention"}
    for run, moved, flops in cases.values():
        with ops.using_backend("triton"):
            run()
        assert moved > 0
        assert flops >= 0


def test_it_refuses_without_a_gpu(script, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernels.py"])
    assert script.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "benchmarks/kernels.py measures on a CUDA or HIP device, and there is none here.\n"
