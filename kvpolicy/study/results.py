"""The results of a study: one SQLite file, to which every run is appended as it finishes.

A file from elsewhere is input like any other: it is opened for reading only, its tables have to be those that are made
here, every row has a checksum, and what rows hold is checked and bounded.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

from kvpolicy.errors import KVPolicyError
from kvpolicy.inputs import require_ordinary
from kvpolicy.study import records, sealing
from kvpolicy.study.records import CELL_COLUMNS, RUN_COLUMNS, CellRecord, RunRecord, StudyData
from kvpolicy.study.runs import REFERENCE, Run
from kvpolicy.study.sealing import DamagedError, Scalar
from kvpolicy.study.work import Outcome

VERSION: Final = 2
"""Version of the file format."""

_APPLICATION: Final = 0x6B767073  # "kvps"
_TABLES: Final = {
    "meta": """CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL, checksum BLOB NOT NULL) WITHOUT ROWID""",
    "environments": """CREATE TABLE environments (id INTEGER PRIMARY KEY, data TEXT NOT NULL,
    checksum BLOB NOT NULL)""",
    "problems": """CREATE TABLE problems (digest TEXT PRIMARY KEY, prompt TEXT NOT NULL, answer TEXT NOT NULL,
    checksum BLOB NOT NULL) WITHOUT ROWID""",
    "cells": """CREATE TABLE cells (position INTEGER PRIMARY KEY, name TEXT NOT NULL, condition TEXT NOT NULL,
    settings TEXT NOT NULL, model TEXT NOT NULL, dataset TEXT NOT NULL, policy TEXT, digest TEXT NOT NULL, error TEXT,
    data TEXT NOT NULL, keys BLOB NOT NULL, checksum BLOB NOT NULL)""",
    "runs": """CREATE TABLE runs (key TEXT PRIMARY KEY, kind TEXT NOT NULL, model TEXT NOT NULL, dataset TEXT NOT NULL,
    problem INTEGER NOT NULL, seed INTEGER NOT NULL, digest TEXT NOT NULL, error TEXT, metrics TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, document TEXT NOT NULL, output BLOB NOT NULL, tokens BLOB, rows INTEGER NOT NULL,
    environment INTEGER NOT NULL, finished REAL NOT NULL, checksum BLOB NOT NULL) WITHOUT ROWID""",
}
_COLUMNS: Final[Mapping[str, Sequence[str]]] = {  # the first one is the table's key
    "meta": ("name", "value"),
    "environments": ("id", "data"),
    "problems": ("digest", "prompt", "answer"),
    "cells": CELL_COLUMNS,
    "runs": RUN_COLUMNS,
}
_NOTED: Final = "SELECT value FROM meta WHERE name = 'runs'"


class ResultsError(KVPolicyError):
    """A results file cannot be read or written, or is damaged."""


class Results:
    """A results file.

    Args:
        path: the file; made if it is not there and `study` is given.
        study: name of the study that writes; None opens for reading only, and changes nothing.

    Raises:
        ResultsError: there is no such file, it is of another version or another study, damaged, or cannot be opened.
    """

    def __init__(self, path: str | Path, study: str | None = None) -> None:
        self.path = Path(path)
        self._writes = study is not None
        try:
            there, link = self.path.is_file(), self.path.is_symlink()
        except (OSError, ValueError):  # too long for a name
            raise ResultsError(f"{str(self.path)[:200]}...: cannot be the name of a file; name another one.") from None
        if study is None and not there:
            raise ResultsError(f"{self.path}: there is no such file; run the study first, or name its file with --out.")
        if study is not None and link:
            raise ResultsError(f"{self.path}: is a symbolic link; name the file itself with --out.")
        if there:
            require_ordinary(self.path, "results file", error=ResultsError)
        with self._said():
            self._db = self._connected()
            try:
                self._open(study)
            except BaseException:
                self._db.close()
                raise
        found = self.meta("study")
        if study is not None and found not in (None, study):
            self.close()
            raise ResultsError(
                f"{self.path}: holds the results of study {found!r}, not of {study!r}; name another file with --out."
            )

    def _connected(self) -> sqlite3.Connection:
        # Writing is opened as "rwc" only where a study says so: a reader leaves no trace beside the file either.
        mode = "rwc" if self._writes else "ro"
        return sqlite3.connect(f"{self.path.absolute().as_uri()}?mode={mode}", uri=True, timeout=30)

    def _open(self, study: str | None) -> None:
        self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, sealing.MOST_BYTES)
        for guard in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0"):
            self._db.execute(f"PRAGMA {guard}")
        application, version, tables = (
            self._db.execute(query).fetchone()[0]
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if not tables and study is not None:
            self._db.execute("PRAGMA journal_mode = WAL")
            schema = ";\n".join(_TABLES.values())
            self._db.executescript(
                f"BEGIN; PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {VERSION}; {schema}; COMMIT;"
            )
            with self._db:
                self._put("meta", [("study", study)])
        elif not tables and not application:
            raise ResultsError(f"{self.path}: nothing is recorded in it yet; run the study first.")
        elif application != _APPLICATION:
            raise ResultsError(f"{self.path}: is not a results file of kvpolicy; name another file with --out.")
        elif version != VERSION:
            raise ResultsError(
                f"{self.path}: is a results file of version {version}, and this kvpolicy reads version {VERSION}; "
                "use the kvpolicy that wrote it, or name another file with --out."
            )
        else:
            self._check_whole()
            if study is not None:
                self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")

    def _check_whole(self) -> None:
        """Refuse a file whose pages or tables are not as they are made here, before anything in it is read."""
        found = dict(self._db.execute("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_autoindex_%'"))
        if found != _TABLES:
            raise DamagedError("its tables are not those of a results file")
        (problem,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        pages, size = (self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        # With a log beside it a file may be behind; SQLite itself takes a last page that is cut off for one of zeros.
        whole = self.path.with_name(f"{self.path.name}-wal").exists() or self.path.stat().st_size == pages * size
        if problem != "ok" or not whole:
            raise DamagedError("its pages do not fit together")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was written then lies in that file alone."""
        if self._writes:
            with suppress(sqlite3.Error):  # somebody reads it: then SQLite's side files stay for now
                self._db.execute("PRAGMA busy_timeout = 0")
                self._db.execute("PRAGMA journal_mode = DELETE")
        self._db.close()

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Say in one sentence what is wrong with the file."""
        try:
            yield
        except DamagedError as error:
            raise self._damaged(str(error)) from error
        except UnicodeDecodeError as error:  # in what SQLite says of the file, or in the file
            raise self._damaged("a text in it is not UTF-8") from error
        except (sqlite3.Error, sqlite3.Warning, OverflowError) as error:
            reason = str(error)
            if "full" in reason:
                safe = "what was recorded before is safe, and the same command goes on from there"
                said = f"the disk is full; make room ({safe})"
            elif "not a database" in reason:
                said = "is not a results file of kvpolicy; name another file with --out"
            elif any(word in reason for word in ("unable to open", "readonly", "locked", "I/O", "authoriz")):
                said = f"cannot be read or written ({reason}); see to it, or name another file with --out"
            else:
                raise self._damaged(f"SQLite says: {' '.join(reason.split())[:120]}") from error
            raise ResultsError(f"{self.path}: {said}.") from error

    def _damaged(self, reason: str) -> ResultsError:
        return ResultsError(
            f"{self.path}: is damaged: {reason}; take a copy of the file as it was written, or run the study again "
            "with another --out."
        )

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _put(self, table: str, rows: Iterable[Sequence[Scalar]], how: str = "INSERT OR REPLACE") -> None:
        sealed = [(*row, sealing.seal(table, row)) for row in rows]
        if sealed:
            places = ", ".join("?" * len(sealed[0]))
            self._db.executemany(f"{how} INTO {table} VALUES ({places})", sealed)

    def _rows(self, table: str) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a table in order of their key, each checked to be as it was written."""
        names = ", ".join((*_COLUMNS[table], "checksum"))
        with self._said():
            # In one statement, for somebody may be writing: what was noted of all runs belongs to these runs.
            query = f"SELECT {names}, ({_NOTED}) FROM {table} ORDER BY {_COLUMNS[table][0]}"  # noqa: S608 - our own names
            count, together, last, noted = 0, 0, None, None
            for *row, checksum, told in self._db.execute(query):
                sealing.check(table, row, checksum)
                records.require_kinds(table, row)
                if last is not None and (type(last) is not type(row[0]) or not last < row[0]):
                    raise DamagedError(f"the rows of its table `{table}` are not in order")
                last, noted, count, together = row[0], told, count + 1, together ^ int.from_bytes(checksum)
                yield tuple(row)
            if table == "runs":
                if not count:
                    query = f"SELECT ({_NOTED}) FROM (SELECT 1) WHERE NOT EXISTS (SELECT 1 FROM runs)"  # noqa: S608
                    noted = next((told for (told,) in self._db.execute(query)), None)
                if (noted or _noted(0, 0)) != _noted(count, together):
                    raise DamagedError("runs are missing in it")

    # -- writing ------------------------------------------------------------------------------------------------------

    def set_study(
        self, study: Mapping[str, Any], models: Sequence[Mapping[str, Any]], cells: Sequence[CellRecord]
    ) -> None:
        """Replace what the study asks for; runs stay.

        Args:
            study: `StudySpec.to_data()`.
            models: `records.model_data` of each.
            cells: every variant in every place, with the keys of its runs.

        Raises:
            ResultsError: the study is longer than is read back, or the file cannot be written.
        """
        rows = [records.cell_row(i, cell) for i, cell in enumerate(cells)]
        meta = {"spec": json.dumps(study), "models": json.dumps(list(models)), "cells": _together(rows)}
        if len(meta["spec"]) > sealing.MOST_TEXT:
            reason = "the study takes more than 1 MiB with its policies in full; compare fewer of them"
            raise ResultsError(f"{self.path}: {reason}.")
        with self._said(), self._db:
            self._db.execute("DELETE FROM cells")
            self._put("cells", rows)
            self._put("meta", meta.items())

    def environment(self, data: Mapping[str, Any]) -> int:
        """Return the number under which versions and machine are noted."""
        text = json.dumps(data, sort_keys=True)
        known = {data: number for number, data in self._rows("environments")}
        if text not in known:
            known[text] = max(known.values(), default=0) + 1
            with self._said(), self._db:
                self._put("environments", [(known[text], text)])
        return cast("int", known[text])

    def add(self, runs: Sequence[Run], outcomes: Sequence[Outcome], environment: int) -> None:
        """Append finished runs, all or none.

        Raises:
            ResultsError: the disk is full, or the file cannot be written.
        """
        now = time.time()
        problems, rows = [], []
        for run, outcome in zip(runs, outcomes, strict=True):
            problem = run.problem
            problems.append((problem.digest, problem.prompt or problem.text, problem.answer))
            # The tokens of the full cache's answers are the teachers of forced runs.
            teacher = run.policy.policy == REFERENCE and run.kind == "generate"
            rows.append(
                records.run_row(run, outcome, teacher=teacher, rows=len(runs), environment=environment, now=now)
            )
        with self._said(), self._db:
            self._put("problems", problems, "INSERT OR IGNORE")
            before = self._checksums(run.key for run in runs)
            self._put("runs", rows)
            self._note_change(before, self._checksums(run.key for run in runs))

    def remove(self, keys: Collection[str]) -> None:
        """Remove runs, and the problems and environments that only they have; the file shrinks.

        Args:
            keys: of the runs that go.
        """
        left = [record for record in self._records() if record.key not in keys]
        contents = {record.document.get("content") for record in left}
        used = {record.environment for record in left}
        with self._said():
            with self._db:
                before = self._checksums(keys)
                self._db.executemany("DELETE FROM runs WHERE key = ?", [(key,) for key in keys])
                self._note_change(before, [])
                gone = [digest for digest, *_ in self._rows("problems") if digest not in contents]
                self._db.executemany("DELETE FROM problems WHERE digest = ?", [(digest,) for digest in gone])
                numbers = [number for number, _ in self._rows("environments") if number not in used]
                self._db.executemany("DELETE FROM environments WHERE id = ?", [(number,) for number in numbers])
            self._db.execute("VACUUM")

    def _checksums(self, keys: Iterable[str]) -> list[bytes]:
        query = "SELECT checksum FROM runs WHERE key = ?"
        return [checksum for key in keys for (checksum,) in self._db.execute(query, (key,))]

    def _note_change(self, before: Sequence[bytes], after: Sequence[bytes]) -> None:
        """Note what stands for all runs, for some have changed: none of them can go without a trace."""
        ((told,),) = self._db.execute(f"SELECT ({_NOTED})")
        count, _, hexadecimal = (told or _noted(0, 0)).partition(" ")
        together = int(hexadecimal, 16)
        for checksum in (*before, *after):
            together ^= int.from_bytes(checksum)
        self._put("meta", [("runs", _noted(int(count) + len(after) - len(before), together))])

    # -- reading ------------------------------------------------------------------------------------------------------

    def meta(self, name: str) -> str | None:
        """Return what is noted under a name: the name of the study, the study, the models."""
        return dict(self._rows("meta")).get(name)

    def study(self) -> StudyData:
        """Return the fields of the study as it ran last; empty if it has not run."""
        text = self.meta("spec")
        with self._said():
            return cast("StudyData", {} if text is None else sealing.read_json(records.STUDY, text, "the study"))

    def models(self) -> list[dict[str, str | None]]:
        """Return the models of the study as it ran last."""
        text = self.meta("models")
        with self._said():
            found: list[dict[str, str | None]] = []
            return found if text is None else sealing.read_json(records.MODELS, text, "the list of models")

    def cells(self) -> list[CellRecord]:
        """Return what the study asked for when it ran last, in the order of its file, the full cache first."""
        noted = self.meta("cells") or _together([])
        with self._said():
            rows = list(self._rows("cells"))
            if noted != _together(rows):
                raise DamagedError("variants of the study are missing in it")
            return [records.read_cell(row) for row in rows]

    def finished(self, *, failed: bool) -> set[str]:
        """Return the keys of runs that succeeded, or that failed."""
        return {record.key for record in self._records() if (record.error is not None) == failed}

    def teachers(self) -> dict[str, tuple[int, ...]]:
        """Return the answers of the full cache as tokens, by key."""
        found = {}
        with self._said():
            for row in self._rows("runs"):
                key, error, tokens = (row[RUN_COLUMNS.index(name)] for name in ("key", "error", "tokens"))
                if tokens is not None and error is None:
                    found[key] = records.read_tokens(tokens)
        return found

    def lengths(self, keys: Iterable[str]) -> dict[str, int]:
        """Return prompt and answer together, in tokens, of those runs that are there and did not fail."""
        wanted = set(keys)
        found = {}
        with self._said():
            for record in self._records():
                if record.key in wanted and record.error is None and record.kind == "generate":
                    if "tokens" not in record.metrics:
                        raise DamagedError("an answer of the full cache has no length")
                    found[record.key] = record.prompt_tokens + int(record.metrics["tokens"])
        return found

    def records(self, keys: Collection[str] | None = None, *, outputs: bool = True) -> list[RunRecord]:
        """Return runs, ordered by what they are, not by when they finished.

        Args:
            keys: of which runs; all if None.
            outputs: with the generated texts, which take memory.
        """
        found = [record for record in self._records(outputs=outputs) if keys is None or record.key in keys]
        return sorted(found, key=lambda r: (r.model, r.dataset, r.digest, r.kind, r.seed, r.problem, r.key))

    def _records(self, *, outputs: bool = False) -> Iterator[RunRecord]:
        with self._said():
            for row in self._rows("runs"):
                yield records.read_run(row, output=outputs)

    def problems(self) -> dict[str, tuple[str, str]]:
        """Return (prompt, answer) by the digest of a problem's content."""
        return {digest: (prompt, answer) for digest, prompt, answer in self._rows("problems")}

    def environments(self) -> dict[int, dict[str, str | None]]:
        """Return versions and machines that runs were made with, by number."""
        with self._said():
            return {
                number: sealing.read_json(records.ENVIRONMENT, data, "the versions")
                for number, data in self._rows("environments")
            }


def _together(cells: Sequence[Sequence[Scalar]]) -> str:
    """Return what stands for all rows of the table of cells: none of them can go without a trace."""
    return sealing.seal("all cells", [sealing.seal("cells", row) for row in cells]).hex()


def _noted(runs: int, together: int) -> str:
    """Return the number of runs and the exclusive or of their checksums, which does not depend on their order."""
    return f"{runs} {together:032x}"
