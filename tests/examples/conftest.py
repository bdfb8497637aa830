from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from kvpolicy.testing.tiny import tiny_folder

FOLDER = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example():
    """Return a function that loads a script of the examples as a module."""

    def load(name):
        found = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return module

    torch.set_num_threads(1)
    return load


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a tiny model, and a tokenizer of one token per character that knows how to chat."""
    folder = tiny_folder(tmp_path_factory.mktemp("models") / "tiny", "llama")
    turns = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(turns + "{% if add_generation_prompt %}a: {% endif %}")
    return folder
