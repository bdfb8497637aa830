"""The notebooks run from top to bottom, and hold the outputs of a run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def script():
    found = importlib.util.spec_from_file_location("notebooks_script", ROOT / "scripts" / "notebooks.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["idea_to_figure", "idea_to_trace"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_it_holds_the_outputs_of_a_run_and_nothing_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("text/html" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    assert len(text) < script().MOST_BYTES
    assert "/home/" not in text
    assert "/root/" not in text
    assert str(ROOT) not in text


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
@pytest.mark.filterwarnings("default")
def test_it_runs_and_shows_what_it_shows(path, monkeypatch):
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = script().executed(path)
    kept = json.loads(path.read_text(encoding="utf-8"))

    def kinds(notebook):
        return [[sorted(o.get("data", {"text": ""})) for o in c.get("outputs", [])] for c in notebook["cells"]]

    assert kinds(made) == kinds(kept)
