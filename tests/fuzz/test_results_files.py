"""Damaged and forged results files: a report that is right, or one sentence; no traceback, no hang, bounded memory.

See `kvsupport.fuzzing` for seeds and numbers of cases.
"""

from __future__ import annotations

import functools
import itertools
import json
import operator
import sqlite3
import zlib

import pytest

from kvpolicy import KVPolicyError
from kvpolicy.cli import main
from kvpolicy.study import results, sealing
from kvpolicy.study.report.content import Commands, build
from kvpolicy.study.report.markdown import markdown
from kvpolicy.study.results import _COLUMNS, Results
from kvpolicy.study.spec import StudySpec
from kvpolicy.study.work import Outcome
from kvsupport.fuzzing import bounded, bounded_memory, cases, check_mixture, check_sentence
from kvsupport.scripted import scripted_study

pytest.importorskip("scipy")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

SPEC = StudySpec(
    study="small",
    models=["nowhere"],
    datasets=[{"use": "needle", "words": 20, "chat": False, "forced": True}],
    axes={"policy": ["rkv", "random"]},
    conditions={"budget": [64, 128], "trigger.interval": [16]},
    samples=2,
    metrics=["exact", "kl", "bytes_peak"],
)
BOMB = zlib.compress(b"[" + b"1," * (sealing.MOST_BYTES // 2 + 1) + b"1]", 9)
ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi")
)
DEEP = "[" * 100_000
VALUES = [
    None, 0, 1, -1, 2**62, -(2**62), 0.5, float("inf"), 1e308, -1e308, "", " ", "x", b"", b"x", b"\xff\xfe", b"\0" * 40,
    "{", "[]", "{}", "null", "NaN", "Infinity", "true", '{"exact": NaN}', '{"exact": 0.5}', '{"exact": "1"}',
    '{"exact": 1e999}', '{"kl": -5}', '{"tokens": -1}', '{"tokens": 1e300}', '{"exact": null}', '{"exact": [1]}',
    '{"a": 1, "a": 2}', '["a"]', '{"budget": 3}', '{"budget": null}', '{"budget": {"tokens": "x"}}', '"\\ud800"',
    "9" * 5000, '{"samples": ' + "9" * 5000 + "}", DEEP, '{"axes": ' + DEEP, ALIASES, "!!python/object:os.system x",
    "a\0b", "\x1b]0;title\x07", "\u202edenrut", "x" * 100_000, BOMB, zlib.compress(b"[1, 2"), zlib.compress(b"\xff"),
    zlib.compress(b"[-1]"), zlib.compress(b"[" * 100_000), "full", "rkv", "generate", "force", "other",
    "<script>", "[red]x[/nothing]", "nan", "1e5", '{"metrics": 5}', '{"metrics": ["nothing"]}', '{"compare_to": "x"}',
    '{"models": "x"}', '{"datasets": [{"path": [[1]]}]}', '{"axes": {"policy": 1}}', '[{"name": 3}]', "[[]]",
    '[{"name": "x"}]', '{"runs": "x"}', "0 ", "1 00", "../../x",
]  # fmt: skip
ENDLESS = (
    "DROP TABLE {t}; CREATE VIEW {t} AS WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT * FROM r"
)
SQL = [
    "DROP TABLE {t}", "DELETE FROM {t}", "ALTER TABLE {t} ADD COLUMN extra", "ALTER TABLE {t} RENAME TO other",
    "CREATE TABLE more (x)", "CREATE VIEW more AS SELECT * FROM {t}", "CREATE INDEX more ON {t} ({c})",
    "CREATE TRIGGER more AFTER INSERT ON {t} BEGIN SELECT 1; END", "PRAGMA user_version = 1",
    "PRAGMA user_version = -5",
    "PRAGMA application_id = 7", "UPDATE {t} SET checksum = x'00'", "UPDATE {t} SET checksum = NULL",
    "DELETE FROM {t} WHERE {c} = (SELECT max({c}) FROM {t})", "PRAGMA journal_mode = WAL", "PRAGMA auto_vacuum = 2",
    ENDLESS,
]  # fmt: skip


def script(task, item):
    metrics = {"bytes_peak": 64.0, "kl": 0.25, "tokens": 50.0}
    if task.kind == "generate":
        metrics["exact"] = float((item.problem.index + len(task.policy["policy"])) % 2)
    return Outcome(None, metrics, "an answer", (1, 2, 3), 30)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a good file, and what its report says."""
    path = tmp_path_factory.mktemp("good") / "small.sqlite"
    scripted_study(SPEC, path, script)
    return path.read_bytes(), said(path)


def said(path):
    with Results(path) as opened:
        return markdown(build(opened, Commands("run", "report")))


def flipped(draw, path):
    """Change bytes of the file: a good report is still the right one, for they may be bytes that mean nothing."""
    raw = bytearray(path.read_bytes())
    kind = draw.randrange(6)
    at = draw.randrange(len(raw))
    if kind <= 2:
        for _ in range(draw.choice([1, 1, 1, 4, 50])):
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    elif kind == 3:
        del raw[at:]
    elif kind == 4:
        size = draw.choice([1, 16, 4096])
        raw[at : at + size] = bytes(size) if draw.random() < 0.5 else draw.randbytes(size)
    else:
        other = draw.randrange(len(raw) // 4096) * 4096
        at -= at % 4096
        raw[at : at + 4096] = raw[other : other + 4096]
    path.write_bytes(raw)
    return True


def changed(draw, path, *, forged):
    """Change a value in a row; `forged`: with a checksum that fits, so that only what the value is can be wrong."""
    with sqlite3.connect(path) as database:
        table = draw.choice(list(_COLUMNS))
        columns = _COLUMNS[table]
        rows = database.execute(f"SELECT * FROM {table}").fetchall()
        row = list(draw.choice(rows))
        key, column = row[0], draw.randrange(len(columns))
        value = draw.choice(VALUES)
        if isinstance(row[column], str) and draw.random() < 0.5:
            value = bent(draw, row[column])
        row[column] = value
        if forged:
            row[-1] = sealing.seal(table, row[:-1])
        places = ", ".join(f"{name} = ?" for name in (*columns, "checksum"))
        try:
            database.execute(f"UPDATE {table} SET {places} WHERE {columns[0]} = ?", (*row, key))
            if forged and table == "runs":
                sums = [int.from_bytes(each[-1]) for each in database.execute("SELECT * FROM runs")]
                whole = results._noted(len(sums), functools.reduce(operator.xor, sums))
                seal = sealing.seal("meta", ("runs", whole))
                database.execute("UPDATE meta SET value = ?, checksum = ? WHERE name = 'runs'", (whole, seal))
            if forged and table == "cells":
                cells = database.execute("SELECT * FROM cells ORDER BY position").fetchall()
                whole = sealing.seal("all cells", [sealing.seal("cells", each[:-1]) for each in cells]).hex()
                seal = sealing.seal("meta", ("cells", whole))
                database.execute("UPDATE meta SET value = ?, checksum = ? WHERE name = 'cells'", (whole, seal))
        except (sqlite3.Error, OverflowError, UnicodeEncodeError):  # what SQLite itself does not take
            pass
    database.close()
    return not forged


def bent(draw, text):
    """Change a JSON text in one place, or any text by a few characters."""
    try:
        data = json.loads(text)
    except ValueError:
        at = draw.randrange(len(text) + 1)
        return text[:at] + draw.choice(["", "x", "\0", "\x1b", '"', "{", "9" * 400]) + text[at + draw.randrange(3) :]
    where = data
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where))) if isinstance(where, list) else []
        if not keys:
            return draw.choice([v for v in VALUES if isinstance(v, str)])
        key = draw.choice(keys)
        if draw.random() < 0.4 or not isinstance(where[key], dict | list):
            break
        where = where[key]
    where[key] = draw.choice([None, 3, -1, 1e300, "", "x" * 5000, [], {}, [[]], True, float("nan"), 10**30, "<b>"])
    return json.dumps(data)


def restructured(draw, path):
    """Change the tables themselves."""
    table = draw.choice(list(_COLUMNS))
    database = sqlite3.connect(path)
    try:
        database.executescript(draw.choice(SQL).format(t=table, c=_COLUMNS[table][0]))
        database.commit()
    except sqlite3.Error:
        pass
    database.close()
    return False


@pytest.mark.timeout(0)
def test_a_damaged_file_gives_a_right_report_or_one_sentence(good, tmp_path, capsys):
    raw, right = good
    counts = {"right": 0, "refused": 0, "other": 0}
    with bounded_memory():
        for case, draw in cases("results", 300):
            path = tmp_path / "f.sqlite"
            for file in tmp_path.iterdir():
                file.unlink()
            path.write_bytes(raw)
            kind = draw.choice(["flipped", "changed", "forged", "forged", "restructured"])
            if kind == "flipped":
                same = flipped(draw, path)
            elif kind == "restructured":
                same = restructured(draw, path)
            else:
                same = changed(draw, path, forged=kind == "forged")
            before, files = path.read_bytes(), {file.name for file in tmp_path.iterdir()}
            name = f"case {case} ({kind})"
            with bounded(name):
                found = by_command(path, capsys, name) if case % 50 == 0 else in_one_sentence(path, name)
            assert path.read_bytes() == before, case
            new = {file.name for file in tmp_path.iterdir()} - files
            assert new <= {"f.html", "f.md", "f.sqlite-shm", "f.sqlite-wal"}
            if found is None:
                counts["refused"] += 1
            elif found in (right, True):
                counts["right"] += 1
            else:
                counts["other"] += 1
                assert not same, f"{name}: a report without complaint that is not the right one"
    print(counts)
    check_mixture(0.25, counts["refused"], counts["right"] + counts["other"])


def in_one_sentence(path, case):
    """What the report says, or None if the file is refused."""
    try:
        return said(path)
    except KVPolicyError as error:
        check_sentence(str(error), case)
    return None


def by_command(path, capsys, case):
    for suffix in (".html", ".md"):
        path.with_suffix(suffix).write_text("old")
    code = main(["study", "report", str(path)])
    out, err = capsys.readouterr()
    if code == 0:
        assert (out.startswith("Written: "), err) == (True, ""), case
        return True
    assert (code, out) == (1, ""), case
    assert err.startswith("error: "), case
    assert err.count("\n") == 1, case
    assert path.with_suffix(".html").read_text() == path.with_suffix(".md").read_text() == "old", case
    return None
