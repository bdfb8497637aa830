from __future__ import annotations

import json
import sys

import pytest


@pytest.fixture
def engines(script, monkeypatch, tiny_folder):
    module = script("engines")
    prompts = [[7, 8, 9, 10, 11, 12], [9, 10, 11], [3, 4, 5, 6]]
    monkeypatch.setattr(module.sides, "prompts", lambda model, count: prompts[:count])
    return module


def test_transformers_runs_all_settings_and_evicts(engines, monkeypatch, tiny_folder, capsys):
    monkeypatch.setattr(engines, "QUICK", {
        "batch": engines.Setting(2, 40), "tight": engines.Setting(3, 40, 5),
        "long": engines.Setting(1, 60, None, 16, 8),
    })  # fmt: skip
    out = tiny_folder.parent / "engines.json"
    engines.main(["--quick", "--model", str(tiny_folder), "--json", str(out)])

    report = json.loads(out.read_text())
    assert report["benchmark"] == "engines"
    assert set(report["results"]) == {"batch", "tight", "long"}
    for name, found in report["results"].items():
        assert set(found) == {"transformers, full", "transformers, rkv"}
        for each in found.values():
            assert each["tokens"] == report["settings"][name]["requests"] * report["settings"][name]["tokens"]
            assert each["per_cpu_second"] == pytest.approx(each["tokens"] / each["cpu"])
    # 46 entries are two blocks of 32, so that two requests go together in a pool of 5 with its null block.
    assert report["results"]["tight"]["transformers, full"]["more"] == {"rows at once": 2}
    assert "tokens/s of CPU time" in capsys.readouterr().out


def test_an_engine_that_fails_says_why_and_the_others_go_on(engines, tiny_folder):
    options = engines.parsed(["--quick", "--model", str(tiny_folder), "--vllm", sys.executable])
    lanes = engines.lanes_of(options, tiny_folder)
    found = engines.run("batch", engines.Setting(1, 4), lanes, options)
    assert found["transformers, full"]["tokens"] == 4
    assert found["vllm, full"] == {"failed": "ModuleNotFoundError: No module named 'vllm'"}
    engines.report("batch", engines.Setting(1, 4), found)


def test_an_engine_that_takes_too_long_is_stopped(engines, tiny_folder):
    options = engines.parsed(["--quick", "--model", str(tiny_folder), "--limit", "0.2"])
    lane = engines.lanes_of(options, tiny_folder)[0]
    found = engines.run("batch", engines.Setting(1, 4), [lane], options)
    assert found == {"transformers, full": {"failed": "not done within 0 s"}}


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [([[1, 2], [3, 4]], [[1, 2], [3, 4]], 1.0), ([[1, 2], [3, 4]], [[1, 9], [9, 4]], 0.25)],
)
def test_agreement_ends_at_the_first_difference(engines, one, other, share):
    assert engines.agreement(one, other) == share


def test_openvino_needs_the_exported_model_too(engines, capsys):
    with pytest.raises(SystemExit):
        engines.parsed(["--openvino", sys.executable])
    assert "--openvino and --exported belong together" in capsys.readouterr().err


def test_lanes_can_be_chosen(engines, tiny_folder):
    options = engines.parsed(["--lanes", "transformers, rkv"])
    assert [lane.name for lane in engines.lanes_of(options, tiny_folder)] == ["transformers, rkv"]
