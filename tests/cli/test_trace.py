from __future__ import annotations

import base64
import gzip
import io
import json
import re
import sys

import numpy as np
import pytest

from kvpolicy.cli import main
from kvpolicy.testing.tiny import tiny_folder

PROMPT = "<script>document.title = 'hit'</script> Which entries are kept?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with a tokenizer whose tokens are characters."""
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "little")


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "schema_version: 1\npolicy: small\nextends: rkv\nbudget: 24\ntrigger: {every: 8}\nprotect: {recent: 4}\n"
        "importance: {observe: 4}\n"
    )
    return path


@pytest.fixture
def run(capsys, folder, tmp_path):
    def call(*arguments, name="out.html"):
        out = tmp_path / name
        code = main(["trace", "--model", str(folder), "--device", "cpu", "--out", str(out), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err, out

    return call


def data_of(path):
    page = path.read_text(encoding="utf-8")
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    blob = gzip.decompress(base64.b64decode(data["blob"]))
    for each in data["traces"]:
        for name in ("compactions", "evicted"):
            kind, place, length = each[name]
            each[name] = np.frombuffer(blob, kind, length, place)
    return data


def text_of(trace):
    return "".join(trace["texts"])


def test_a_page_of_one_policy(run, policy):
    code, out, err, path = run("--policy", policy, "--max-new-tokens", 50, PROMPT)
    assert (code, err) == (0, "")
    data = data_of(path)
    (one,) = data["traces"]
    assert data["model"] == "little"
    assert (one["policy"], one["about"], one["prompt"]) == ("small", "budget 24", len(PROMPT))
    assert one["seen"] == len(PROMPT) + 49
    assert text_of(one).startswith(PROMPT)
    assert len(one["texts"]) == len(PROMPT) + 50
    done = len(one["compactions"])
    assert done > 2
    held = (one["evicted"] == one["never"]).sum() / 6
    assert (
        out.splitlines()[-2]
        == f"small: {one['seen']} tokens seen, {done} compactions, {held:.0f} entries per head held at the end."
    )
    assert re.fullmatch(rf"{re.escape(str(path))}: \d+ kB; open it in a browser\.", out.splitlines()[-1])


def test_the_text_is_that_of_generate(run, capsys, folder, policy):
    *_, path = run("--policy", policy, "--max-new-tokens", 30, PROMPT)
    assert main(["generate", "--model", str(folder), "--policy", str(policy), "--max-new-tokens", "30", PROMPT]) == 0
    out = capsys.readouterr().out
    written = text_of(data_of(path)["traces"][0])[len(PROMPT) :]
    assert written.strip() in out


def test_two_policies_write_their_own_texts(run, policy):
    options = ("--policy", policy, "--compare", "recent-pinned", "--budget", 80, "--max-new-tokens", 90)
    code, _, _, path = run(*options, PROMPT)
    assert code == 0
    data = data_of(path)
    assert not data["same"]
    assert [each["about"] for each in data["traces"]] == ["budget 80", "budget 80"]


def test_the_second_policy_can_read_what_the_first_one_wrote(run, policy):
    code, out, _, path = run("--policy", policy, "--compare", "full", "--same-text", "--max-new-tokens", 40, PROMPT)
    assert code == 0
    data = data_of(path)
    first, second = data["traces"]
    assert data["same"]
    assert first["texts"] == second["texts"]
    assert (second["about"], len(second["compactions"])) == ("keeps everything", 0)
    assert "full: 102 tokens seen and no compaction; a smaller --budget or a longer text shows more." in out


def test_a_given_text_is_read(run, policy, tmp_path, monkeypatch):
    text = "A text that was given, word by word,\nand a second line of it. " * 2
    (tmp_path / "text.txt").write_text(text)
    for prompt, length in [((PROMPT,), len(PROMPT)), ((), 1), (("-",), 5)]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("asked"))
        code, _, err, path = run(
            "--policy", policy, "--compare", "streaming-llm", "--budget", 24, "--text", tmp_path / "text.txt", *prompt
        )
        assert (code, err) == (0, "")
        data = data_of(path)
        assert data["same"]
        first, second = data["traces"]
        assert first["prompt"] == length
        assert text_of(first).endswith(text.replace("\n", "<unk>"))
        assert first["seen"] == second["seen"] == len(first["texts"])
        assert len(first["compactions"]) > 3


def test_a_policy_for_prompts_says_that_the_text_behind_one_is_not_compressed(run, tmp_path):
    (tmp_path / "text.txt").write_text("A text that was given, word by word. " * 3)
    text = ("--text", tmp_path / "text.txt", "--budget", 0.5)
    code, out, _, _ = run("--policy", "snapkv-prefill", *text, PROMPT)
    assert code == 0
    assert f"the prompt is {len(PROMPT)} of {len(PROMPT) + 111} tokens" in out
    assert f"kvpolicy trace --policy snapkv-prefill - < {tmp_path / 'text.txt'}" in out
    code, out, _, _ = run("--policy", "keydiff", *text, PROMPT)
    assert (code, "compacts prompts only" in out) == (0, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "rkw", "x"], "unknown policy 'rkw'. Did you mean 'rkv'?"),
        (["--compare", "ful", "x"], "unknown policy 'ful'. Did you mean 'full'?"),
        (["--budget", "5", "x"], "budget: 5 entries are fewer than the 12 that are protected"),
        (["--budget", "many", "x"], "--budget: 'many' is not a number; write 256 for entries or 0.1 for a share."),
        (["--temperature", "0", "x"], "--temperature: 0 should be from 0.0001"),
        (["--dtype", "int8", "x"], "--dtype: 'int8' is not one of auto, float32, bfloat16, float16."),
        (["--device", "gpu", "x"], "--device: 'gpu' cannot be used:"),
        (["--chat", "x"], "--chat: this model's tokenizer has no chat template; leave --chat out."),
        ([], "PROMPT is empty; write the text to continue, or a file to read with --text."),
        ([" "], "PROMPT is empty"),
        (["--same-text", "x"], "--same-text: there is one policy; name a second one with --compare."),
        (["--text", "TEXT", "--seed", "1", "x"], "--seed: with --text nothing is generated; leave --seed out."),
        (["--text", "TEXT", "--max-new-tokens", "9", "x"], "--max-new-tokens: with --text nothing is generated; leave"),
        (["--text", "TEXT", "--compare", "full", "--same-text", "x"], "--same-text: with --text both policies read"),
        (["--text", "TEXT", "--chat"], "--chat: there is no PROMPT to put into the chat template"),
        (["--text", "TEXT", ""], "PROMPT is empty"),
        (["--text", "GONE", "x"], "--text: GONE: there is no such file."),
        (["--text", "EMPTY", "x"], "--text: EMPTY is empty; name a file with the text to read."),
        (["--text", "BYTES", "x"], "--text: BYTES: is not UTF-8 text (byte 0); give a text file."),
        (["--text", "LONG"], "--text: makes a text of 4,097 tokens, and the model has 4,096 positions; give"),
        (["--text", "LONGER", "x"], "--text: makes a text of more than 4,096 tokens, and the model has"),
        (["x" * 4095, "--max-new-tokens", "2"], "--max-new-tokens: behind 4,095 tokens of text there is room for 1 of"),
        (["--out", "FOLDER", "x"], "--out: FOLDER is a folder; name a file such as trace.html."),
        (["--out", "GONE/x.html", "x"], "--out: GONE/x.html is in a folder that does not exist; name a file such as"),
    ],
)
def test_wrong_options_are_one_sentence(run, tmp_path, arguments, message):
    (tmp_path / "TEXT").write_text("some text")
    (tmp_path / "LONG").write_text("x" * 4097)
    (tmp_path / "LONGER").write_text("x" * 70000)
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "BYTES").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "FOLDER").mkdir()
    places = ("TEXT", "LONG", "EMPTY", "BYTES", "GONE", "FOLDER")
    code, out, err, path = run(*(str(tmp_path / a) if a.startswith(places) else a for a in arguments))
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.replace(f"{tmp_path}/", "").removeprefix("error: ").startswith(message)
    assert err.count("\n") == 1
    assert not path.exists()


def test_without_transformers(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("x")[:3] == (1, "", "error: trace needs transformers; install it with: pip install 'kvpolicy[hf]'.\n")


@pytest.mark.parametrize(("option", "value"), [("--dtype", "int8"), ("--device", "gpu")])
def test_what_is_wrong_with_an_option_is_said_before_the_demo_model_is_made(
    capsys, monkeypatch, tmp_path, option, value
):
    monkeypatch.setenv("KVPOLICY_HOME", str(tmp_path))
    for words in (["trace", PROMPT], ["generate", PROMPT], ["calibrate", "headkv", "--text", __file__]):
        out = [] if words[0] == "generate" else ["--out", str(tmp_path / "it.safetensors")]
        assert main([*words, *out, option, value]) == 1
        assert capsys.readouterr().err.startswith(f"error: {option}: '{value}' ")
    assert main(["calibrate", "headk", "--text", __file__, "--out", str(tmp_path / "it.safetensors")]) == 1
    assert "there is no calibration" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
