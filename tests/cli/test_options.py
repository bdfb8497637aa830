"""Options that no run could honour, and places that cannot be written: one sentence, before a model is loaded."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from kvpolicy.cli import main
from kvpolicy.testing.tiny import tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("options") / "tiny", "qwen3")


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


WRONG = {
    "--temperature": (["nan", "inf", "-inf", "0", "-1", "1e-300", "1e300"], "should be from 0.0001 to 10000"),
    "--top-p": (["nan", "inf", "0", "1.5", "-0.1"], "should be above 0 and at most 1"),
    "--seed": ([str(2**70), str(2**63), "-1", str(-(2**70))], "should be at least 0 and less than 2**63"),
    "--device": (["meta", "", "cpu:x", "[/x]", "nowhere"], "cannot be used: "),
    "--dtype": (["float64", "", "[/x]"], "is not one of auto, float32"),
    "--max-new-tokens": ([str(2**31 + 1), str(2**70)], "should be at most 2147483648"),
    "--budget": (["nan", "inf", "9" * 400, str(2**31 + 1), "x"], ""),
}


@pytest.mark.parametrize("command", ["generate", "trace"])
@pytest.mark.parametrize("option", WRONG)
def test_an_option_that_cannot_be_honoured_is_refused(option, command, run, model):
    values, reason = WRONG[option]
    for value in values:
        code, out, err = run(command, "hello", "--model", model, f"{option}={value}")
        assert (code, out, err.count("\n")) == (1, "", 1), (value, out, err)
        assert err.startswith(f"error: {option.removeprefix('--') if option == '--budget' else option}") or (
            option == "--budget" and err.startswith("error: --budget: 'x'")
        ), err
        assert reason in err


def test_calibration_is_bounded_as_well(run, model, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 100)
    words = ["calibrate", "headkv", "--text", "text.txt", "--out", "t.safetensors", "--model", model]
    for option, value in (("--device", "meta"), ("--seed", 2**70), ("--runs", 2**70), ("--length", 2**70)):
        code, out, err = run(*words, option, value)
        assert (code in (1, 2), out) == (True, ""), (option, out, err)
        assert option in err
    assert not (tmp_path / "t.safetensors").exists()


def test_a_prompt_is_text_of_a_bounded_length(run, model, monkeypatch):
    for given, reason in ((io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8"), "is not UTF-8 text"),
                          (io.StringIO("x" * (1 << 26) + "xx"), "is longer than 64 MiB")):  # fmt: skip
        monkeypatch.setattr(sys, "stdin", given)
        code, out, err = run("generate", "-", "--model", model)
        assert (code, out) == (1, "")
        assert err.startswith(f"error: PROMPT {reason}")
    assert run("generate", "\udcff", "--model", model)[2].startswith("error: PROMPT is not UTF-8 text")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")  # noqa: PTH110
@pytest.mark.parametrize(
    "words",
    [["list"], ["show", "rkv"], ["--help"], ["validate", "m.yaml"]],
)
def test_a_full_standard_output_is_said(words, tmp_path):
    (tmp_path / "m.yaml").write_text("schema_version: 1\npolicy: m\nextends: rkv\n")
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-P", "-m", "kvpolicy", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    sentence = "error: standard output: cannot be used (No space left on device); name another one.\n"
    assert done.stderr == sentence


@pytest.mark.parametrize("where", ["/proc/x", "/dev/null/x", "folder-without/x", "link"])
def test_places_that_cannot_be_written_are_said(where, run, tmp_path, model):
    (tmp_path / "link.html").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 20)
    for words in (
        ["schema", "--out", f"{where}.html"],
        ["trace", "--text", "text.txt", "--model", model, "--out", f"{where}.html"],
        ["new", "plugin", "mine-own", "--into", where],
    ):
        code, out, err = run(*words)
        assert (code, err.count("\n")) == (1, 1), (words, out, err)
        assert err.startswith(("error: --out: ", "error: --into: ", "error: NAME: ")), err
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_said(run, tmp_path):
    tmp_path.chmod(0o500)
    try:
        for words in (["schema", "--out", "x.json"], ["new", "plugin", "mine-own"]):
            code, _, err = run(*words)
            assert (code, err.count("\n"), "Permission denied" in err) == (1, 1, True)
    finally:
        tmp_path.chmod(0o700)


def test_a_command_that_is_not_there_is_answered_with_those_that_are(capsys):
    for words, named in (
        (("zzz",), "list, show, validate"),
        (("new", "policy"), "plugin"),
        (("study", "q"), "plan, run"),
    ):
        assert main(words) == 2
        assert f"Commands: {named}" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_all_that_is_wrong_in_a_file_is_said_by_every_command(capsys, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text("schema_version: 1\npolicy: wrong\nextends: rkv\nbudget: 0\nallocator: adakv\n")
    for words in (("explain",), ("show",), ("generate", "x", "--policy")):
        assert main([*words, str(file)]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert [line.partition(": ")[0] for line in lines] == ["error", "error"]
        assert "wrong.yaml:4:" in lines[0]
        assert "Did you mean the policy 'adakv-snapkv'?" in lines[1]


def test_one_name_is_not_names(capsys):
    assert main(["show", "--diff", "rkv"]) == 1
    assert "one name was given; name two policies" in capsys.readouterr().err
