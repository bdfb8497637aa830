"""Every cache is a line, and what cannot be run is a line that says why."""

from __future__ import annotations

import json
import time

import pytest
import torch


@pytest.fixture
def benchmark(script):
    with torch.compiler.set_stance("force_eager"):  # what compiling makes is tested elsewhere
        yield script("gpu_decode")


def run(benchmark, tmp_path, *arguments):
    file = tmp_path / "decode.json"
    code = benchmark.main(["--quick", *arguments, "--json", str(file)])
    return code, json.loads(file.read_text())["rows"]


@pytest.mark.parametrize("shape", ["toy-llama", "toy-qwen2"])
def test_every_cache_is_measured_and_holds_no_more_than_was_estimated(shape, benchmark, tmp_path, monkeypatch):
    made = []
    own = benchmark.Bench

    class Noted(own):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(benchmark, "Bench", Noted)
    code, rows = run(benchmark, tmp_path, "--shape", shape)
    assert code == 0
    assert [row["cache"] for row in rows] == [benchmark.FULL, *benchmark.POLICIES, benchmark.STATIC]
    for row in rows:
        assert row["outcome"] == "measured"
        assert row["batch"] > 1
        assert row["tokens_per_second"] > 0
        assert row["cache_bytes"] <= row["batch"] * made[0].row_bytes(row["cache"], row["context"])
        of_policy = row["cache"] in benchmark.POLICIES
        assert (row["compaction_share"] is not None) == of_policy
        if of_policy:
            interval = 8
            spent = interval * row["step_ms"]["median"] + row["compaction_ms"]["median"]
            assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] * interval / spent)
            assert 0 < row["compaction_share"] < 1


def test_what_cannot_be_run_is_a_line_and_the_others_are_measured(benchmark, tmp_path, monkeypatch):
    own = benchmark.Bench.batched

    def batched(self, name, *arguments):
        if name == "rkv":
            raise torch.OutOfMemoryError("no")
        if name == "snapkv":
            raise ValueError("something\nelse")
        return own(self, name, *arguments)

    monkeypatch.setattr(benchmark.Bench, "batched", batched)
    code, rows = run(benchmark, tmp_path)
    outcomes = {row["cache"]: row["outcome"] for row in rows}
    assert code == 1
    assert outcomes["rkv"].startswith("out of memory, although only")
    assert outcomes["snapkv"] == "failed: ValueError: something"
    assert outcomes["rkv-density"] == outcomes[benchmark.STATIC] == "measured"
    assert all(row["tokens_per_second"] is None for row in rows if row["outcome"] != "measured")


def test_no_line_is_begun_that_needs_more_memory_or_time_than_there_is(benchmark, tmp_path):
    options = benchmark.argparse.Namespace(
        budget=24, interval=8, tokens=1, memory=0.001, compactions=1, compiler="eager"
    )
    model = benchmark.random_model("toy-llama", torch.device("cpu"), torch.float32)
    bench = benchmark.Bench(model, options, benchmark.devices.Deadline(None))
    row = bench.line(benchmark.FULL, 40, 500, pytest.fail)
    assert row.outcome.startswith("not run: it needs about 0 GB")
    late = benchmark.devices.Deadline(time.time() + 5.4)
    assert late.refuses(4.0) is None
    assert late.refuses(60.0) == "not run: it needs about 60 s and 5 s are left"
    assert benchmark.devices.Deadline(0.0).refuses(1.0) == "not run: it needs about 1 s and 0 s are left"


def test_without_a_gpu_it_refuses(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 2
    assert capsys.readouterr().err == (
        "benchmarks/gpu_decode.py measures on a CUDA or HIP device, and there is none here.\n"
    )
