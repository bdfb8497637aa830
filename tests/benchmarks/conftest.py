"""The scripts in `benchmarks/` as modules, on a model of two layers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole scripts run here, even if at tiny sizes: part of the long tests."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=4096,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture
def script(monkeypatch, tiny_folder, tmp_path):
    """Load a script by name; its text is random, its model tiny and its threads one, whoever asks."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    threads = torch.get_num_threads()

    def tokens(count):
        return torch.randint(0, 500, (1, count), generator=torch.Generator().manual_seed(1))

    def load(name):
        monkeypatch.syspath_prepend(BENCHMARKS / "shared")
        from kvbench import lanes, real

        own = real.load_model
        monkeypatch.setattr(real, "load_model", lambda folder=None: own(folder or tiny_folder))
        monkeypatch.setattr(real, "real_tokens", tokens)
        monkeypatch.setattr(lanes, "real_tokens", tokens)
        spec = importlib.util.spec_from_file_location(f"kvpolicy_benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    yield load
    torch.set_num_threads(threads)


@pytest.fixture
def measured(script, tmp_path):
    """Run a script with `--json` and return what it wrote."""

    def run(name, *arguments):
        out = tmp_path / f"{name}.json"
        script(name).main([*map(str, arguments), "--json", str(out)])
        report = json.loads(out.read_text())
        assert report["benchmark"] == name
        assert report["machine"]["threads"] == 1
        return report

    return run
