"""Mutated study files and options: a study, or one error that names the place; no traceback, hang or execution.

`KVPOLICY_FUZZ_SEED` starts elsewhere and `KVPOLICY_FUZZ_CASES` runs more; a failure names the number of its case.
"""

from __future__ import annotations

import copy
import os
import random
import time

import yaml

import kvpolicy
from kvpolicy import SpecError
from kvpolicy.cli import main
from kvpolicy.spec import yaml_text
from kvpolicy.spec.odd_text import odd_character
from kvpolicy.study.spec import StudySpec

FILES = {entry.name: entry.path for entry in kvpolicy.catalog().studies()}
SEED = int(os.environ.get("KVPOLICY_FUZZ_SEED", "0"))
CASES = int(os.environ.get("KVPOLICY_FUZZ_CASES", "250"))
SECONDS = 10
DEEP: object = "x"
for _ in range(60):
    DEEP = [DEEP]
VALUES = [
    None, True, False, 0, 1, -1, 2, 10**6, 10**30, 10**400, 0.0, 0.5, -0.1, 1e308, float("inf"), float("nan"), "", " ",
    "x", "rkv", "full", "x" * 5000, "é\u2028", "a\nb", "../..", "/etc/passwd", "{", "%s%n", "{0}", "[/bold]", [], [1],
    ["rkv"], ["rkv", "rkv"], [[]], {}, {"use": "needle"}, {"use": "needle", "words": -1}, {"use": 3}, {"use": None},
    {"trace": 0.5}, {"trace": 7}, {"trace": None}, {"trace": 0.1, "tokens": 3}, {"every": 3}, {"": 1}, {"budget": [64]},
    {"policy": ["rkv", "snapkv"]}, {"mixer.weight": list(range(200))}, {"use": "jsonl", "path": "/dev/zero"},
    {"use": "text", "path": []}, {"use": "generator", "family": "prompt-recall", "samples": 10**9}, DEEP,
    "\x1b]0;x\x07", "a\0b", "\u202ex", "\ud800", ["\x9b"], {"\x1b": 1}, {"extends": "/dev/zero"}, {"extends": "rkv"},
]  # fmt: skip
SNIPPETS = [
    "!!python/object/apply:os.system ['touch {mark}']", "&a [*a]", "<<: *a", "? [a, b]\n: c", "---", "\t", "- ", ": ",
    "#", "'", '"', r'"\x00"', r'"\ud800"', r'"\e]0;x"', "[[[[", "{{{{", "]]", "\u0007", "\ufeff", "é", "9" * 5000,
    ".nan",
    "1e999", "quick: {{samples: 0}}", "exclude: [{{}}]", "compare_to: nothing", "axes: {{}}", "kind: policy",
]  # fmt: skip


def places(data, path=()):
    """The paths of all values."""
    found = [path] if path else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def structural(draw, data):
    """Change a parsed file in one place."""
    path = draw.choice(places(data))
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    key, kind = path[-1], draw.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind <= 2:
        parent[key] = copy.deepcopy(draw.choice(VALUES))
    elif kind == 3 and isinstance(parent, dict):
        word = str(key)
        at = draw.randrange(len(word) + 1)
        parent[draw.choice([word[:at] + word[at + 1 :], f"{word[:at]}x{word[at:]}", word.upper(), ""])] = parent.pop(
            key
        )
    elif kind == 4 and isinstance(parent, dict):
        parent[draw.choice([*data, *parent, "quick", "exclude", "extra", "use"])] = copy.deepcopy(draw.choice(VALUES))
    else:
        parent[key] = [parent[key]] if draw.random() < 0.5 else {"use": parent[key]}


def textual(draw, text, mark):
    """Change a file's text in one place."""
    lines = text.split("\n")
    kind, n = draw.randrange(5), draw.randrange(len(lines))
    if kind == 0:
        lines[n] = draw.choice([" ", "\t", "- "]) + lines[n]
    elif kind == 1:
        lines.insert(n, draw.choice(SNIPPETS).format(mark=mark))
    elif kind == 2:
        head, colon, _ = lines[n].partition(": ")
        lines[n] = head + (colon or ": ") + draw.choice(SNIPPETS).format(mark=mark)
    elif kind == 3:
        lines.insert(n, draw.choice(lines))
    else:
        return text[: draw.randrange(len(text))]
    return "\n".join(lines)


def mutated(draw, mark):
    text = FILES[draw.choice(sorted(FILES))].read_text(encoding="utf-8")
    for _ in range(draw.randint(1, 2)):
        if draw.random() < 0.3:
            text = textual(draw, text, mark)
            continue
        try:
            data = yaml.safe_load(text)
            structural(draw, data)
            text = yaml_text.write(data) if draw.random() < 0.5 else yaml.safe_dump(data, allow_unicode=False)
        except (yaml.YAMLError, SpecError, AttributeError, TypeError, IndexError, KeyError, ValueError, RecursionError):
            text = textual(draw, text, mark)
    return text


def test_a_mutated_study_is_read_or_refused_in_one_sentence(tmp_path, capsys):
    file, mark = tmp_path / "fuzz.yaml", tmp_path / "mark"
    counts = {"read": 0, "refused": 0}
    for case in range(SEED, SEED + CASES):
        draw = random.Random(f"study {case}")
        file.write_bytes(mutated(draw, mark).encode("utf-8", "surrogatepass"))
        start = time.process_time()
        try:
            spec = StudySpec.from_file(file)
        except SpecError as error:
            counts["refused"] += 1
            sentence = str(error)
        except BaseException as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
        else:
            counts["read"] += 1
            sentence = "fuzz.yaml"
            assert StudySpec(**spec.to_data()) == spec, case
        assert time.process_time() - start < SECONDS, case
        assert "fuzz.yaml" in sentence, case
        assert "\n" not in sentence, case
        assert odd_character(sentence) is None, case
        if case % 50 == 0:
            assert main(["study", "status", str(file), "--out", str(tmp_path / "none.sqlite")]) == 1
            out, err = capsys.readouterr()
            assert (out, err.count("\n"), err[:7]) == ("", 1, "error: "), case
    assert not mark.exists()
    print(counts)
    assert min(counts.values()) > CASES / 50


OPTIONS = ["--quick", "--no-probe", "--out", "--device", "--workers", "--batch", "--on", "--address", "--html", "--yes"]
ARGUMENTS = [
    "small.yaml", "small.sqlite", "rkv-lambda", "nothing", "", " ", "-", "--", "x" * 5000, "/dev/null", "/", ".", "~",
    "~nobody/x",
    "\x1b[2J", "[/x]", "[bold]", "é", "0", "-1", "1", "9" * 30, "nan", "meta", "cuda:99", "cpu", "tpu",
    "ray",
    "a.sqlite",
    "/proc/self/mem", "link.sqlite", "no/x.sqlite", "127.0.0.1:1", "x:y:z", "small.html",
]  # fmt: skip


def test_any_words_after_study_are_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(
        "schema_version: 1\nkind: study\nstudy: small\nbase: rkv\nmodels: ['./[/x] nowhere']\n"
        "datasets: [{use: needle}]\n"
    )
    (tmp_path / "small.sqlite").write_bytes(b"no database")
    (tmp_path / "link.sqlite").symlink_to(tmp_path / "elsewhere")
    for case in range(SEED, SEED + CASES):
        draw = random.Random(f"words {case}")
        words = [draw.choice(["plan", "run", "status", "report", "prune"])]
        words += [draw.choice(ARGUMENTS) for _ in range(draw.choice([0, 1, 1, 1, 1, 2]))]
        for _ in range(draw.randrange(3)):
            words += [draw.choice(OPTIONS), draw.choice(ARGUMENTS)]
        if "rkv-lambda" in words:  # a real study would run
            words.append("--quick=3")
        try:
            code = main(["study", *words])
        except BaseException as error:
            raise AssertionError(f"case {case} {words}: {type(error).__name__}: {error}") from error
        out, err = capsys.readouterr()
        assert code in (1, 2), (case, words, out)
        assert "Traceback" not in err, (case, words)
        assert code == 2 or (err.startswith("error: ") and err.count("\n") == 1), (case, words, err)
        assert odd_character(err) is None, (case, words)
    assert not (tmp_path / "elsewhere").exists()
