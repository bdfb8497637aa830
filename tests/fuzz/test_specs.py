"""Mutated policy files: each is read, or refused with one error that names the place; no crash, hang or execution.

`KVPOLICY_FUZZ_SEED` starts elsewhere; a failure names the number of its case, which alone repeats it.
"""

from __future__ import annotations

import copy
import os
import random
import re
import signal
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

import kvpolicy
from kvpolicy import KVPolicyError, PolicySpec, SpecError
from kvpolicy.cli import main

FILES = {entry.name: entry.path.read_text() for entry in kvpolicy.catalog().policies() if entry.path is not None}
SEED = int(os.environ.get("KVPOLICY_FUZZ_SEED", "0"))
SECONDS = 30
DEEP: object = "x"
for _ in range(60):
    DEEP = [DEEP]
VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 10**400, -(10**30), 0.0, 0.5, -0.1, 1.5, 1e308, float("inf"),
    float("nan"), "", " ", "x", "8", "0.5", "true", "null", "no", "rkv", "key_norm", "x" * 5000, "é\u2028\x85", "a\nb",
    "../..", "/etc/passwd", "{", "%s%n", "{0}", "[bold]", [], [1], ["rerotate"], [[]], {}, {"use": "random"},
    {"use": 3}, {"use": None}, {"every": 3}, {"": 1}, {"a": {"b": {"c": 1}}}, {"tokens": 0},
    {"tokens": 5, "fraction": 0.5}, {"fraction": 2}, {"fraction": float("nan")}, DEEP,
]  # fmt: skip
EXTENDS = [
    "rkv", "rvk", "fuzz", "fuzz.yaml", "./fuzz.yaml", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/", "~",
    "../" * 50, "\0", "x" * 5000, "rkv.yaml", 3, None, ["rkv"], "nothing.yaml", "/proc/self/environ",
    "x" * 5000 + ".yaml", "~nobody/x.yaml", "a\nb.yaml",
]  # fmt: skip
SNIPPETS = [
    "!!python/object/apply:os.system ['touch {mark}']", "!!python/object/new:pathlib.Path [{mark}]",
    "!!python/name:os.system", "!!python/module:os", "!!binary aGVsbG8=", "!!set {{a, b}}", "!!timestamp 2001-01-01",
    "!!map", "!custom x", "&a [*a]", "&a", "*a", "<<: *a", "{{<<: {{a: 1}}}}", "? [a, b]\n: c", "? {{a: b}}\n: c",
    "---", "...", "--- a", "%YAML 1.1", "%TAG ! tag:x,2000:", "\t", "- ", ": ", "#", "|", ">-\n  a", "'", '"',
    r'"\x00"', r'"\ud800"', "[[[[", "{{{{", "]]", "}}}}", "\u0000", "\u0007", "\ufeff", "\u2028", "\x85", "é",
    "\U0001f600", "0x", "0o9", "1_000", "9" * 5000, "1e999", ".nan", "-.inf", "0b11", "190:20:30", "=", "~",
    "2001-01-01", "@", "`", "a: b: c",
]  # fmt: skip


# -- mutations --------------------------------------------------------------------------------------------------------


def places(data, path=()):
    """Return the paths of all values."""
    found = [path] if path else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def parent_of(data, path):
    for key in path[:-1]:
        data = data[key]
    return data


def structural(draw, data):
    """Change a parsed file in one place."""
    path = draw.choice(places(data))
    parent, key = parent_of(data, path), path[-1]
    other = draw.choice(places(data))
    kind = draw.randrange(9)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        parent[key] = copy.deepcopy(draw.choice(VALUES))
    elif kind == 2 and isinstance(parent, dict):
        parent[misspelt(draw, str(key))] = parent.pop(key)
    elif kind == 3:
        parent[key] = (
            [parent[key]] if draw.random() < 0.5 else {draw.choice(["use", "every", "x", "count"]): parent[key]}
        )
    elif kind == 4:
        parent[key] = copy.deepcopy(parent_of(data, other)[other[-1]])
    elif kind == 5 and isinstance(parent, dict):
        parent[draw.choice([*parent, "observe", "threshold", "extra", "use", "extends"])] = copy.deepcopy(
            draw.choice(VALUES)
        )
    elif kind == 6:
        data["extends"] = draw.choice(EXTENDS)
    elif kind == 7:
        entry = draw.choice(kvpolicy.catalog().entries())
        field = {"protection": "protect"}.get(entry.kind, entry.kind)
        data[field] = {"protect": {entry.name: True}, "post": [entry.name]}.get(field, entry.name)
    elif isinstance(parent[key], str):
        parent[key] = misspelt(draw, parent[key])
    elif isinstance(parent[key], int | float):
        parent[key] = draw.choice([-1, 1000, 0.001, -parent[key], str(parent[key])])


def misspelt(draw, word):
    i = draw.randrange(len(word) + 1)
    letter = draw.choice("aez_-. :{[\n\0é")
    return draw.choice(
        [word[:i] + word[i + 1 :], word[:i] + letter + word[i:], word[::-1], word.upper(), word * 50, ""]
    )


def textual(draw, text, mark):
    """Change a file's text in one place."""
    lines = text.split("\n")
    kind, n = draw.randrange(9), draw.randrange(len(lines))
    if kind == 0:
        lines.insert(n, draw.choice(lines))
    elif kind == 1:
        del lines[n]
    elif kind == 2:
        lines[n] = draw.choice([" ", "  ", "\t", "- "]) + lines[n]
    elif kind == 3:
        draw.shuffle(lines)
    elif kind == 4:
        lines.insert(n, draw.choice(SNIPPETS).format(mark=mark))
    elif kind == 5:
        head, colon, _ = lines[n].partition(": ")
        lines[n] = head + (colon or ": ") + draw.choice(SNIPPETS).format(mark=mark)
    elif kind == 6:
        i = draw.randrange(len(lines[n]) + 1)
        lines[n] = lines[n][:i] + draw.choice(SNIPPETS).format(mark=mark) + lines[n][i:]
    elif kind == 7:
        return draw.choice(["\r\n", "\r", "\u2028", "\n\n"]).join(lines)
    else:
        return text[: draw.randrange(len(text))]
    return "\n".join(lines)


def damaged(draw, raw):
    """Change some bytes."""
    raw = bytearray(raw)
    for _ in range(draw.randint(1, 6)):
        i = draw.randrange(len(raw) + 1)
        kind = draw.randrange(4)
        if kind == 0 and i < len(raw):
            raw[i] ^= 1 << draw.randrange(8)
        elif kind == 1:
            raw[i:i] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 4)))
        elif kind == 2:
            del raw[i : i + draw.randint(1, 20)]
        else:
            j = draw.randrange(len(raw) + 1)
            raw[i:i] = raw[j : j + 30]
    return bytes(raw)


def mutant(number, mark):
    """Return the content of the file with this number."""
    draw = random.Random(f"{SEED}-{number}")
    text = FILES[draw.choice(sorted(FILES))]
    raw = None
    kinds = draw.choices(["structure", "text", "bytes"], [5, 3, 2], k=draw.choice([1, 1, 1, 2, 3]))
    for kind in sorted(kinds, reverse=True):  # structure last would not be able to read what the others made
        if kind == "structure" and raw is None:
            data = yaml.safe_load(FILES[draw.choice(sorted(FILES))]) if text is None else yaml.safe_load(text)
            for _ in range(draw.choice([1, 1, 2, 4])):
                if data:
                    structural(draw, data)
            text = yaml.safe_dump(data, sort_keys=False, default_flow_style=draw.choice([None, True, False]))
            break
    if "text" in kinds:
        text = textual(draw, text, mark)
    raw = text.encode("utf-8", "surrogatepass")
    return damaged(draw, raw) if "bytes" in kinds else raw


# -- what must hold ---------------------------------------------------------------------------------------------------


@contextmanager
def watchdog(what):
    def late(*_):
        raise AssertionError(f"{what}: more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(path, number):
    """Read one file; return whether it is valid."""
    what = f"case {number}, seed {SEED}"
    message = ""
    with watchdog(what):
        try:
            spec = PolicySpec.from_file(path)
        except SpecError as error:
            message = str(error)
        except KVPolicyError as error:
            pytest.fail(f"{what}: {type(error).__name__} {error}")
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        if not message:
            again = PolicySpec.from_yaml(spec.to_yaml())
            assert again == spec, what
            spec.build()
            return True
    assert len(message.splitlines()) == 1, (what, message)
    assert len(message) < 2500, (what, message)
    assert message.startswith(f"{path}:") or re.match(r"[^ ]+: ", message), (what, message)  # or the file it extends
    assert re.search(r"[.?)]$", message), (what, message)
    assert re.search(r"[a-z]", message), (what, message)
    return False


def fuzz(tmp_path, numbers):
    path, mark = tmp_path / "fuzz.yaml", tmp_path / "executed"
    valid = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in numbers:
            path.write_bytes(mutant(number, mark))
            valid += judge(path, number)
            assert not mark.exists(), f"case {number}, seed {SEED}: a file was able to run code"
    print(f"{valid} of {len(numbers)} mutants are valid")
    return valid


@pytest.mark.timeout(300)
def test_300_mutated_files(tmp_path):
    valid = fuzz(tmp_path, range(300))
    assert 10 < valid < 250  # neither harmless nor hopeless


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_10000_mutated_files(tmp_path):
    assert 300 < fuzz(tmp_path, range(300, 10_300)) < 8000


def test_the_command_line_says_it_in_a_line_each(tmp_path, capsys):
    paths = []
    for number in range(40):
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_bytes(mutant(number, tmp_path / "executed"))
    code = main(["validate", *map(str, paths)])
    captured = capsys.readouterr()
    assert code == 1
    lines = captured.out.splitlines() + captured.err.splitlines()
    assert len(lines) == len(paths)
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


@pytest.mark.timeout(120)
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_at_once(bomb, tmp_path):
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[bomb])
    assert not judge(path, bomb)


def test_odd_files_are_refused(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (*tmp_path.iterdir(), Path("/dev/zero"), Path("/dev/null"), tmp_path / ("x" * 300 + ".yaml")):
        message = ""
        with watchdog(str(path)):
            try:
                PolicySpec.from_file(path)
            except SpecError as error:
                message = str(error)
        assert len(message.splitlines()) == 1, path
