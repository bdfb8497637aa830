"""Any words after `kvpolicy`: what they ask for, or one sentence; no traceback, no hang, bounded memory.

All commands run in this process and in an empty folder with a few files, right and wrong ones, on a tiny model. See
`kvsupport.fuzzing` for seeds and numbers of cases.
"""

from __future__ import annotations

import io
import os

import pytest
import typer

from kvpolicy.cli import main
from kvpolicy.cli.app import app
from kvpolicy.odd_text import odd_character
from kvpolicy.study import executors
from kvpolicy.testing.tiny import tiny_folder
from kvsupport.fuzzing import bounded, bounded_memory, cases, check_mixture

pytest.importorskip("scipy")
pytest.importorskip("transformers")

POLICY = (
    "schema_version: 1\npolicy: mine\nbudget: 16\ntrigger: {every: 8}\nprotect: {recent: 4}\nimportance: key_norm\n"
)
STUDY = """\
schema_version: 1
kind: study
study: small
axes: {policy: [rkv, random]}
conditions: {budget: [64], trigger.interval: [16]}
models: [tiny]
datasets: [{use: needle, words: 20, chat: false}]
samples: 2
sampling: {max_new_tokens: 4}
"""
WORDS = [
    "", " ", "-", "--", "x" * 5000, "/dev/null", "/dev/full", "/", ".", "..", "~", "~nobody/x", "\x1b[2J", "[/x]",
    "[bold]", ":smile:", "é", "\udcff", "\u202e", "a\nb", "a\0b", "0", "-1", "1", "0.5", "9" * 30, str(2**31 + 1),
    str(2**70), "nan", "inf", "1e-300", "true", "none", "/proc/self/mem", "/proc/kmsg", "/proc/nothing.html",
    "nothing", "nothing.yaml", "nothing.sqlite", "no/x.sqlite", "no/x.html", "link.sqlite", "link.html", "pipe.yaml",
    "locked.sqlite", "bytes.txt", "text.txt", "mine.yaml", "broken.yaml", "small.yaml", "small.sqlite", "tiny", "rkv",
    "full", "snapkv-prefill", "knorm", "key_norm", "importance.none", "kvpolicy", "rkv-lambda", "smollm2-135m/headkv",
    "meta", "cuda:99", "cpu", "auto", "tpu", "local", "ray", "127.0.0.1:1", "x:y:z", "con", "torch", "my-plugin",
    "policy", "table", "headkv", "qfilter", "float32", "float99", "quick", "%s", "{0}", "$HOME", "*", "--help",
    "--version", "--debug=x", "--json", "key_norm.py:X",
]  # fmt: skip
# What would take long or fetch something is bounded: the last of an option counts, and one that stands before may take
# the first of these words for its value.
BOUNDS = {
    ("generate",): ["--model=tiny", "--model=tiny", "--max-new-tokens=3"],
    ("trace",): ["--model=tiny", "--model=tiny", "--max-new-tokens=3"],
    ("calibrate",): ["--model=tiny", "--model=tiny", "--runs=1", "--length=40"],
    ("check",): ["--law=deterministic", "--law=deterministic", "--jobs=1", "--profile=quick"],
}


def commands(group, path=()):
    """Yield the words of every command, how many arguments it takes, and its options."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            arguments = sum(parameter.param_type_name == "argument" for parameter in command.params)
            options = [option for p in command.params for option in p.opts if option.startswith("-")]
            yield (*path, name), arguments, options or ["--help"]


COMMANDS = list(commands(typer.main.get_command(app)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with right and wrong files, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVPOLICY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(executors, "Processes", lambda workers: executors.Inline())
    tiny_folder(tmp_path / "tiny", "qwen3")
    (tmp_path / "mine.yaml").write_text(POLICY)
    (tmp_path / "broken.yaml").write_text(POLICY.replace("key_norm", "key_nrm"))
    (tmp_path / "small.yaml").write_text(STUDY)
    (tmp_path / "small.sqlite").write_bytes(b"no database")
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 40)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\0")
    (tmp_path / "link.sqlite").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link.html").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "locked.sqlite.lock").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe.yaml")
    return tmp_path


def words_of(draw):
    """Return a command with arguments and options, most of them wrong."""
    path, arguments, options = draw.choice(COMMANDS)
    words = [draw.choice(WORDS) for _ in range(max(0, arguments + draw.choice([0, 0, 0, 0, 0, 0, -1, 1])))]
    for _ in range(draw.choice([0, 0, 1, 1, 2, 3])):
        words += [draw.choice(options), *([draw.choice(WORDS)] if draw.random() < 0.9 else [])]
    if draw.random() < 0.1:
        draw.shuffle(words)
    if draw.random() < 0.05:
        words.insert(draw.randrange(len(words) + 1), draw.choice(["--", "--help", "--debug"]))
    before = [draw.choice(WORDS)] if draw.random() < 0.03 else []
    bounds = BOUNDS.get(path, [])
    if path[0] == "study" and {"rkv-lambda", "/dev/full"} & set(words):  # a real study would run
        bounds = ["--quick=3"] * 2  # an option without a value takes the first
    if path == ("check",) and {"--all", "kvpolicy"} & set(words):
        bounds = [*bounds, "--law=nothing"]
    return [*before, *path, *words, *bounds]


@pytest.mark.timeout(0)
def test_any_words_are_served_or_refused_in_one_sentence(folder, capsys, monkeypatch):
    codes = {0: 0, 1: 0, 2: 0}
    kept = {file.name for file in folder.iterdir()}
    with bounded_memory():
        for case, draw in cases("words", 300):
            words = words_of(draw)
            monkeypatch.setattr("sys.stdin", io.StringIO(draw.choice(["", "hello", "y\n", "x" * 1000])))
            with bounded(f"case {case} {words}"):
                code = main(words)
            out, err = capsys.readouterr()
            codes[code] += 1
            assert "Traceback" not in err, (case, words, err)
            said = err if words[0] in ("generate", "trace") else out + err  # what a model says to a file is data
            assert odd_character(said) is None, (case, words, said)
            if code == 1:
                sentences = err.splitlines()
                assert sentences or out, (case, words)
                assert sum(line.startswith("error: ") for line in sentences) <= 1, (case, words, err)
            assert not (folder / "elsewhere").exists(), (case, words)
            assert all((folder / name).exists() or (folder / name).is_symlink() for name in kept), (case, words)
    print(codes)
    check_mixture(0.05, *codes.values())
