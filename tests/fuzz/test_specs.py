"""Mutated policy files: each is read, or refused with one error that names the place; no crash, hang or execution.

See `kvsupport.fuzzing` for seeds and numbers of cases.
"""

from __future__ import annotations

import itertools
import os
import re
import warnings
from pathlib import Path

import pytest
import yaml

import kvpolicy
from kvpolicy import KVPolicyError, PolicySpec, SpecError
from kvpolicy.cli import main
from kvsupport.fuzzing import (
    ANYTHING,
    bounded,
    bounded_memory,
    cases,
    change_structure,
    change_text,
    check_mixture,
    check_sentence,
    damaged,
)

FILES = {entry.name: entry.path.read_text() for entry in kvpolicy.catalog().policies() if entry.path is not None}
VALUES = [
    *ANYTHING, "key_norm", ["rerotate"], {"use": "random"}, {"tokens": 0}, {"tokens": 5, "fraction": 0.5},
    {"tokens": 2**40}, {"fraction": 2}, {"fraction": 10**400}, {"fraction": float("nan")},
]  # fmt: skip
KEYS = ["use", "every", "x", "count", "observe", "threshold", "extra", "extends"]
EXTENDS = [
    "rkv", "rvk", "fuzz", "fuzz.yaml", "./fuzz.yaml", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/kmsg", "/",
    "~", "../" * 50, "\0", "x" * 5000, "rkv.yaml", 3, None, ["rkv"], "nothing.yaml", "/proc/self/environ",
    "x" * 5000 + ".yaml", "~nobody/x.yaml", "a\nb.yaml",
]  # fmt: skip


def mutant(draw, mark):
    """Return the content of a spoilt file."""
    text = FILES[draw.choice(sorted(FILES))]
    kinds = draw.choices(["structure", "text", "bytes"], [5, 3, 2], k=draw.choice([1, 1, 1, 2, 3]))
    if "structure" in kinds:
        data = yaml.safe_load(text)
        for _ in range(draw.choice([1, 1, 2, 4])):
            kind = draw.randrange(9)
            if kind == 0:
                data["extends"] = draw.choice(EXTENDS)
            elif kind == 1:
                entry = draw.choice(kvpolicy.catalog().entries())
                field = {"protection": "protect"}.get(entry.kind, entry.kind)
                data[field] = {"protect": {entry.name: True}, "post": [entry.name]}.get(field, entry.name)
            elif data:
                change_structure(draw, data, VALUES, KEYS)
        text = yaml.safe_dump(data, sort_keys=False, default_flow_style=draw.choice([None, True, False]))
    if "text" in kinds:
        text = change_text(draw, text, mark)
    raw = text.encode("utf-8", "surrogatepass")
    return damaged(draw, raw) if "bytes" in kinds else raw


def judge(path, what):
    """Read one file; return whether it is valid."""
    message = ""
    with bounded(what):
        try:
            spec = PolicySpec.from_file(path)
        except SpecError as error:
            message = str(error)
        except KVPolicyError as error:
            pytest.fail(f"{what}: {type(error).__name__} {error}")
        if not message:
            assert PolicySpec.from_yaml(spec.to_yaml()) == spec, what
            spec.build()
            return True
    check_sentence(message, what)
    assert message.startswith(f"{path}:") or re.match(r"[^ ]+: ", message), (what, message)  # or the file it extends
    assert re.search(r"[.?)]$", message), (what, message)
    assert re.search(r"[a-z]", message), (what, message)
    return False


def fuzz(tmp_path, default):
    path, mark = tmp_path / "fuzz.yaml", tmp_path / "executed"
    found = []
    with warnings.catch_warnings(), bounded_memory():
        warnings.simplefilter("error")
        for number, draw in cases("policy", default):
            path.write_bytes(mutant(draw, mark))
            found.append(judge(path, f"case {number}"))
            assert not mark.exists(), f"case {number}: a file was able to run code"
    print(f"{sum(found)} of {len(found)} mutants are valid")
    check_mixture(0.03, sum(found), len(found) - sum(found))


@pytest.mark.timeout(0)
def test_mutated_files(tmp_path):
    fuzz(tmp_path, 300)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_10000_mutated_files(tmp_path):
    fuzz(tmp_path, 10_000)


def test_the_command_line_says_it_in_a_line_each(tmp_path, capsys):
    paths = []
    for number, draw in itertools.islice(cases("command", 40), 40):
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_bytes(mutant(draw, tmp_path / "executed"))
    code = main(["validate", *map(str, paths)])
    captured = capsys.readouterr()
    assert code == 1
    lines = captured.out.splitlines() + captured.err.splitlines()
    assert len(lines) >= len(paths)
    assert "Traceback" not in captured.err


BOMBS = {
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "merge": "a: &a {x: 1}\nb: {<<: *a}\n",
    "deep flow": "[" * 100_000,
    "deep mapping": "{a: " * 100_000,
    "deep block": "\n".join(" " * n + "a:" for n in range(2000)),
    "dashes": "- " * 100_000,
    "wide": "a: [" + "x, " * 300_000 + "]",
    "long key": "k" * 500_000 + ": 1",
    "question marks": "? " * 50_000,
    "long number": "policy: " + "9" * 500_000,
    "long float": "policy: 0." + "9" * 500_000,
    "quotes": "a: '" + "''" * 200_000,
    "tags": "!!python/object/apply:os.system " * 10_000,
    "comments": "#" * 1_000_000,
    "two megabytes": "a: " + "x" * 2**21,
    "blank lines": "\n" * 1_000_000,
    "brackets in a scalar": "schema_version: 1\npolicy: " + "(" * 100_000,
    "colons": "a" + ": a" * 100_000,
    "documents": "---\n" * 100_000,
    "directives": "%YAML 1.2\n" * 100_000,
    "anchors": "&a " * 100_000,
    "misspelt": "schema_version: 1\npolicy: p\nimportance: {use: " + "key_nrom" * 10_000 + "}\n",
}


@pytest.mark.timeout(0)
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_at_once(bomb, tmp_path):
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[bomb])
    assert not judge(path, bomb)


@pytest.mark.timeout(0)
def test_odd_files_are_refused(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (*tmp_path.iterdir(), Path("/dev/zero"), Path("/dev/null"), tmp_path / ("x" * 300 + ".yaml")):
        message = ""
        with bounded(str(path)):
            try:
                PolicySpec.from_file(path)
            except SpecError as error:
                message = str(error)
        assert len(message.splitlines()) == 1, path
