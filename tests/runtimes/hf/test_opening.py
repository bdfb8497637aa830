"""Models are opened without code of their own, and nobody is asked whether it may be run."""

from __future__ import annotations

import json

import pytest

from kvpolicy.cli.memory import shape_from_config
from kvpolicy.errors import KVPolicyError
from kvpolicy.runtimes.opening import open_model, open_tokenizer
from kvpolicy.testing.tiny import tiny_folder

CODE = """
from pathlib import Path

Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class OwnConfig(LlamaConfig):
    model_type = "own-kind"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a model that brings code, which would leave a mark; whoever asks gets a yes."""
    folder, marker = tiny_folder(tmp_path / "model"), tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own-kind",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return folder, marker


def test_code_that_comes_with_a_model_is_never_run(own):
    folder, marker = own
    for attempt in (
        lambda: open_model(folder, "own", dtype="float32", device="cpu"),
        lambda: open_tokenizer(folder, "own"),
    ):
        with pytest.raises(KVPolicyError, match="'own' cannot be loaded"):
            attempt()
    # What the file says is enough for the size of its cache.
    assert shape_from_config(str(folder), None).layers == 3
    assert not marker.exists()
