"""Whatever a user or a file calls something is printed as it is: no text is markup, wherever it is shown."""

from __future__ import annotations

import io
import os

import pytest
from rich.progress import Progress
from rich.table import Table

from kvpolicy import cli
from kvpolicy.cli import main, terminal
from kvpolicy.odd_text import odd_character

TEXTS = ["[/x]", "[bold]x[/]", "[link=x]y[/link]", "[[", "\\[x]", ":smile:", "[/]", "[#fff]", "[@click=f()]"]
POLICY = """\
schema_version: 1
policy: mine
description: "{text}"
paper: "{text}"
departures: ["{text}"]
budget: 64
trigger: {{every: 16}}
protect: {{recent: 8}}
importance: key_norm
"""


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Return a function that runs a command in an empty folder and returns all that it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("terminals", [True, False])
def test_a_console_prints_text_as_it_is(text, terminals, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    if terminals:
        monkeypatch.setenv("FORCE_COLOR", "1")
    console = terminal.output()
    console.file, console.width = io.StringIO(), 200
    table = Table(text, title=text)
    table.add_row(text)
    for shown in (text, table):
        console.print(shown)
    console.rule(text)
    with console.status(text) as status:
        status.update(text)
    with Progress(terminal.text_column("{task.description}"), console=console, transient=True) as bar:
        bar.add_task(text)
    printed = console.file.getvalue()
    assert printed.count(text) >= (7 if terminals else 5)


@pytest.mark.parametrize("text", TEXTS[:2])
@pytest.mark.parametrize(
    "words",
    [
        ["generate", "hello", "--model"],
        ["trace", "hello", "--model"],
        ["study", "status"],
        ["study", "plan", "nowhere.yaml", "--out"],
        ["explain", "rkv", "--model-config"],
        ["show"],
        ["validate"],
        ["new", "plugin"],
        ["new", "plugin", "mine", "--into"],
        ["list", "--kind"],
    ],
)
def test_a_name_is_said_as_it_was_given(words, text, run):
    code, out, err = run(*words, text)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert text in err or repr(text)[1:-1] in err or "nowhere.yaml" in err


def test_what_a_terminal_would_obey_is_written_out_everywhere(run, tmp_path, monkeypatch):
    odd = "\x1b]0;x\x07\u202e"
    (tmp_path / odd).mkdir()
    assert odd_character(run("new", "plugin", "mine-own", "--into", odd)[1]) is None
    for words in (["schema", odd], ["list", f"--{odd}"], [odd], ["study", odd], ["generate", "--seed", odd]):
        code, out, err = run(*words)
        assert (code, odd_character(out + err)) == (2, None), (words, err)
    assert cli._warned(odd) == "warning: \\x1b]0;x\\x07\\u202e\n"


def test_a_model_folder_with_a_pipe_in_it_is_refused(run, tmp_path):
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "config.json")
    for words in (["generate", "hi", "--model", "model"], ["explain", "rkv", "--model-config", "model"]):
        code, out, err = run(*words)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "ordinary file" in err or "no config.json" in err


@pytest.mark.parametrize("text", [*TEXTS[:2], "[#fff]"])
def test_what_a_file_says_of_itself_is_shown_as_it_is(text, run, tmp_path, monkeypatch):
    folder = tmp_path / text.replace("/", "_")
    folder.mkdir()
    (folder / "mine.yaml").write_text(POLICY.format(text=text.replace("\\", "\\\\")))
    code, out, err = run("show", folder / "mine.yaml")
    assert (code, out.count(text) >= 3, err) == (0, True, "")
    assert run("show", "--diff", folder / "mine.yaml", "knorm")[0] == 0
    assert run("explain", folder / "mine.yaml")[1].startswith(f"mine: {text}")
    monkeypatch.setenv("KVPOLICY_POLICY_PATH", folder.name)
    monkeypatch.setenv("COLUMNS", "400")
    code, out, _ = run("list", "--kind", "policy")
    row = next(line for line in out.splitlines() if "mine" in line.split())
    assert (code, text.rstrip(".") in row, folder.name in row) == (0, True, True)
    code, out, _ = run("check", folder / "mine.yaml", "--law", "deterministic")
    assert (code, str(folder) in out) == (0, True)
