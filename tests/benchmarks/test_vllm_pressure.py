from __future__ import annotations

import sys

import pytest


@pytest.fixture
def pressure(script, monkeypatch):
    module = script("vllm_pressure")
    monkeypatch.setattr(module.engines, "prompts", lambda model, count: [[7, 8, 9]] * count)
    return module


def test_latencies_are_those_of_single_requests(pressure):
    from job import Answer

    times = [[1.0, 1.5, 3.5], [2.0, 2.25, 2.5]]
    took = Answer(4.0, 2.0, [[1, 2, 3], [4, 5, 6]], {}, {"times": times, "steps": 3})
    found = pressure.figures(took)
    assert found["tokens"] == 6
    assert found["per_cpu_second"] == 3.0
    assert found["per_second"] == 1.5
    assert found["first_token"].median == 1.5
    assert found["between_tokens"].median == 0.375  # of 0.5, 2, 0.25, 0.25
    assert found["longest_pause"] == 2.0
    assert found["more"] == {"steps": 3}


def test_a_lane_that_fails_says_why(pressure, tiny_folder, tmp_path, capsys):
    out = tmp_path / "pressure.json"
    pressure.main(["--quick", "--vllm", sys.executable, "--model", str(tiny_folder), "--json", str(out)])
    assert "No module named 'vllm'" in out.read_text()
    said = capsys.readouterr()
    assert "16 blocks: full ..." in said.err
    assert "10" in said.out
