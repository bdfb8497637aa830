from __future__ import annotations

import sqlite3

import pytest

from kvpolicy.study import results as module
from kvpolicy.study.results import Results, ResultsError


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
