from __future__ import annotations

import resource
import sqlite3
import zlib

import pytest

from kvpolicy.study import results as module
from kvpolicy.study import sealing
from kvpolicy.study.analysis import summarise
from kvpolicy.study.results import Results, ResultsError
from kvpolicy.study.runner import writing
from kvpolicy.study.sealing import DamagedError
from kvpolicy.study.spec import StudySpec
from kvpolicy.study.work import Outcome
from kvsupport.scripted import scripted_study


def test_a_file_of_another_version_is_refused_and_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "r.sqlite"
    monkeypatch.setattr(module, "VERSION", 7)
    Results(path, "s").close()
    monkeypatch.undo()
    before = path.read_bytes()
    for study in ("s", None):
        with pytest.raises(ResultsError) as caught:
            Results(path, study)
        assert str(caught.value) == (
            f"{path}: is a results file of version 7, and this kvpolicy reads version 2; use the kvpolicy that wrote "
            "it, or name another file with --out."
        )
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"not a database at all, but text " * 50, None])
def test_what_is_no_results_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "r.sqlite"
    if content is None:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE mine (x)")
        database.close()
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(ResultsError, match="is not a results file of kvpolicy; name another file with --out"):
        Results(path, "s")
    assert path.read_bytes() == before


def test_the_results_of_another_study_are_not_mixed_in(tmp_path):
    path = tmp_path / "r.sqlite"
    Results(path, "one").close()
    with pytest.raises(ResultsError, match="holds the results of study 'one', not of 'two'; name another file"):
        Results(path, "two")
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(ResultsError, match="nothing is recorded in it yet; run the study first"):
        Results(tmp_path / "empty.sqlite")
    with pytest.raises(ResultsError, match="there is no such file; run the study first"):
        Results(tmp_path / "none.sqlite")


def test_a_full_disk_loses_nothing_and_the_study_goes_on(study, table, tmp_path, monkeypatch):
    """SQLite's own limit of pages raises the same error as a full disk."""
    spec = study.make(batch=1, samples=12, sampling={"max_new_tokens": 6})
    made = study.plan(spec)
    study.run(spec, tmp_path / "whole.sqlite", made=made)
    opened = Results._open

    def limited(self, name):
        opened(self, name)
        pages = self._db.execute("PRAGMA page_count").fetchone()[0]
        self._db.execute(f"PRAGMA max_page_count = {pages + 2}")

    path = tmp_path / "full.sqlite"
    Results(path, spec.study).close()
    counts = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(Results, "_open", limited)
            with pytest.raises(ResultsError) as caught:
                study.run(spec, path, made=made)
        assert str(caught.value) == (
            f"{path}: the disk is full; make room (what was recorded before is safe, and the same command goes on from "
            "there)."
        )
        counts.append(len(table(path)[0]))
    assert 0 < counts[0] <= counts[1]
    progress = study.run(spec, path, made=made)
    assert len(progress.recorded) == len(table(tmp_path / "whole.sqlite")[0]) - counts[1]
    assert table(path) == table(tmp_path / "whole.sqlite")


def test_a_file_that_cannot_be_written_is_said_in_one_sentence(tmp_path):
    folder = tmp_path / "r.sqlite"
    folder.mkdir()
    with pytest.raises(ResultsError, match=r"r.sqlite: cannot be read or written \(unable to open database file\)"):
        Results(folder, "s")


SMALL = StudySpec(
    study="small",
    models=["nowhere"],
    datasets=[{"use": "needle", "words": 20, "chat": False}],
    axes={"policy": ["rkv", "random"]},
    conditions={"budget": [64], "trigger.interval": [16]},
    samples=3,
)


@pytest.fixture
def small(tmp_path):
    """The path of a small results file."""
    scripted_study(SMALL, tmp_path / "r.sqlite", lambda task, item: Outcome(None, {"exact": 1.0, "tokens": 5.0}, "x"))
    return tmp_path / "r.sqlite"


def change(path, query, *values):
    database = sqlite3.connect(path)
    with database:
        database.execute(query, values)
    database.close()


def note_runs(database):
    """Make what stands for all runs fit them."""
    together, count = 0, 0
    for (checksum,) in database.execute("SELECT checksum FROM runs"):
        together, count = together ^ int.from_bytes(checksum), count + 1
    row = ("runs", module._noted(count, together))
    database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", (*row, sealing.seal("meta", row)))


def read_all(path):
    with Results(path) as results:
        return summarise(results), results.problems(), results.environments(), results.study(), results.models()


@pytest.mark.parametrize(
    "query",
    [
        'UPDATE runs SET metrics = \'{"exact": 0.0, "tokens": 5.0}\' WHERE problem = 1',
        "UPDATE runs SET error = 'x' WHERE problem = 2",
        "UPDATE cells SET keys = zeroblob(20) WHERE position = 1",
        "DELETE FROM cells WHERE position = 2",
        "DELETE FROM runs WHERE problem = 1",
        "UPDATE problems SET answer = 'other'",
        "UPDATE environments SET data = '{}'",
        "UPDATE meta SET value = '{}' WHERE name = 'spec'",
    ],
)
def test_what_was_changed_after_it_was_written_is_seen(small, query):
    pytest.importorskip("scipy")
    read_all(small)
    change(small, query)
    with pytest.raises(ResultsError, match=r"r\.sqlite: is damaged: .*; take a copy of the file as it was written"):
        read_all(small)


def test_of_a_damaged_file_nobody_says_that_it_is_safe(small):
    raw = small.read_bytes()
    for end in (len(raw) // 2, len(raw) - 100, 4096, 100):
        small.write_bytes(raw[:end])
        for study in (None, "small"):
            with pytest.raises(ResultsError) as caught:
                Results(small, study)
            assert "is damaged: " in str(caught.value) or "is not a results file" in str(caught.value)
            assert "safe" not in str(caught.value)
            assert small.read_bytes() == raw[:end]


def test_what_sqlite_quotes_of_the_file_is_written_out(small):
    with sqlite3.connect(small) as database:
        database.execute("PRAGMA writable_schema = ON")
        database.execute("UPDATE sqlite_master SET sql = replace(sql, 'CREATE', 'CREATE \x0e') WHERE name = 'runs'")
    database.close()
    with pytest.raises(ResultsError, match=r'unrecognized token: "\\x0e"') as caught:
        read_all(small)
    assert "\x0e" not in str(caught.value)


def test_what_sqlite_cannot_quote_of_the_file_is_damage_too(small):
    raw = small.read_bytes()
    small.write_bytes(raw.replace(b"CREATE TABLE environments", b"CREATE T\xacBLE environments", 1))
    with pytest.raises(ResultsError, match="is damaged: a text in it is not UTF-8; "):
        read_all(small)


@pytest.mark.parametrize(
    ("table", "row", "read"),
    [
        ("meta", ("study", b"x"), lambda results: results.meta("study")),
        ("meta", ("study", "a\x1b]0;title\x07"), lambda results: results.meta("study")),
        ("meta", ("other", b""), lambda results: results.meta("study")),
        ("problems", ("0", b"3", "x"), lambda results: results.problems()),
        ("environments", (1, b"{}"), lambda results: results.environment({})),
    ],
)
def test_a_sealed_row_of_other_kinds_is_refused(small, table, row, read):
    places = ", ".join("?" * (len(row) + 1))
    change(small, f"DELETE FROM {table} WHERE {module._COLUMNS[table][0]} = ?", row[0])
    change(small, f"INSERT INTO {table} VALUES ({places})", *row, sealing.seal(table, row))
    with (
        pytest.raises(ResultsError, match=rf"is damaged: the column `\w+` of its table `{table}` holds what cannot"),
        Results(small) as results,
    ):
        read(results)


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/x", "A", ""])
def test_a_file_whose_study_has_no_name_is_refused(small, name):
    """Folders and files are called by it, and old pictures in such a folder are removed."""
    row = ("study", name)
    change(small, "INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", *row, sealing.seal("meta", row))
    with pytest.raises(ResultsError, match="the column `value` of its table `meta` holds what cannot stand there"):
        Results(small)


@pytest.mark.parametrize("finished", [1e12, -1.0, float("inf")])
def test_a_run_that_was_finished_at_no_time_is_refused(small, finished):
    with sqlite3.connect(small) as database:
        row = list(database.execute("SELECT * FROM runs").fetchone())
        row[list(module._COLUMNS["runs"]).index("finished")] = finished
        row[-1] = sealing.seal("runs", row[:-1])
        database.execute(f"INSERT OR REPLACE INTO runs VALUES ({', '.join('?' * len(row))})", row)
        note_runs(database)
    database.close()
    with pytest.raises(ResultsError, match="the column `finished` of its table `runs` holds what cannot"):
        read_all(small)


def test_a_text_that_unpacks_to_a_gigabyte_is_not_unpacked(small):
    pytest.importorskip("scipy")
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1024)) + packer.flush()
    with sqlite3.connect(small) as database:
        row = list(database.execute("SELECT * FROM runs").fetchone())
        names = list(module._COLUMNS["runs"])
        row[names.index("output")] = row[names.index("tokens")] = bomb
        row[-1] = sealing.seal("runs", row[:-1])
        database.execute(f"INSERT OR REPLACE INTO runs VALUES ({', '.join('?' * len(row))})", row)
        note_runs(database)
    database.close()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_all(small)  # a report needs no text
    with Results(small) as results:
        with pytest.raises(ResultsError, match="a compressed text in it has more than 64 MiB"):
            results.teachers()
        (record,) = results.records({row[0]})
        with pytest.raises(DamagedError, match="more than 64 MiB"):
            record.output  # noqa: B018 - it is unpacked when it is asked for
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB


def test_a_study_that_could_not_be_read_back_is_refused_before_it_runs(small):
    with Results(small, "small") as results, pytest.raises(ResultsError, match=r"more than 1 MiB .* compare fewer"):
        results.set_study({"description": "x" * (1 << 20)}, [], [])
    assert read_all(small)[3]["study"] == "small"


def test_a_reader_changes_nothing_and_leaves_nothing(small):
    pytest.importorskip("scipy")
    before = small.read_bytes(), small.stat().st_mtime_ns, sorted(small.parent.iterdir())
    read_all(small)
    assert (small.read_bytes(), small.stat().st_mtime_ns, sorted(small.parent.iterdir())) == before
    small.parent.chmod(0o555)
    try:
        read_all(small)
    finally:
        small.parent.chmod(0o755)


def test_what_a_killed_writer_left_is_read_too(small):
    """SIGKILL leaves SQLite's log beside the file: the reader sees what is in it."""
    writer = Results(small, "small")
    writer.environment({"python": "4"})
    copy = small.parent / "copy"
    copy.mkdir()
    for file in small.parent.glob("r.sqlite*"):
        (copy / file.name).write_bytes(file.read_bytes())
    writer.close()
    assert (copy / "r.sqlite-wal").stat().st_size > 0
    with Results(copy / "r.sqlite") as results:
        assert {"python": "4"} in results.environments().values()
    with Results(copy / "r.sqlite", "small"):
        pass
    assert [file.name for file in copy.iterdir() if not file.name.endswith(".lock")] == ["r.sqlite"]


def test_numbers_that_cannot_be_are_a_failure_of_the_run(tmp_path):
    pytest.importorskip("scipy")
    numbers = iter([float("nan"), 0.5, 1.0] * 3)
    scripted_study(SMALL, tmp_path / "r.sqlite", lambda t, i: Outcome(None, {"exact": next(numbers), "tokens": 5.0}))
    full = read_all(tmp_path / "r.sqlite")[0][0]
    assert (full.runs, full.failed) == (1, 2)
    assert (
        full.error.replace("0.5", "nan")
        == "exact is nan, which cannot be; look for a damaged checkpoint, or use another dtype."
    )


def test_neither_file_nor_lock_is_a_link(small, tmp_path):
    (tmp_path / "link.sqlite").symlink_to(small)
    with pytest.raises(ResultsError, match="is a symbolic link; name the file itself with --out"):
        Results(tmp_path / "link.sqlite", "small")
    (tmp_path / "r.sqlite.lock").unlink(missing_ok=True)
    (tmp_path / "r.sqlite.lock").symlink_to(tmp_path / "theirs")
    with pytest.raises(ResultsError, match=r"r\.sqlite\.lock: is a symbolic link; remove it"), writing(small):
        pass
    assert not (tmp_path / "theirs").exists()
