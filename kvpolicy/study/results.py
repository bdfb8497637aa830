"""The results of a study: one SQLite file, to which every run is appended as it finishes."""

from __future__ import annotations

import json
import os
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from kvpolicy.errors import KVPolicyError
from kvpolicy.study.plan import REFERENCE, Cell, Run
from kvpolicy.study.work import Outcome

VERSION: Final = 1
"""Version of the file format."""

_APPLICATION: Final = 0x6B767073  # "kvps"
_SCHEMA: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE environments (id INTEGER PRIMARY KEY, data TEXT NOT NULL UNIQUE);
CREATE TABLE problems (dataset TEXT, number INTEGER, prompt TEXT NOT NULL, answer TEXT NOT NULL,
    PRIMARY KEY (dataset, number)) WITHOUT ROWID;
CREATE TABLE cells (position INTEGER PRIMARY KEY, name TEXT NOT NULL, condition TEXT NOT NULL, settings TEXT NOT NULL,
    model TEXT NOT NULL, dataset TEXT NOT NULL, policy TEXT, digest TEXT NOT NULL, error TEXT);
CREATE TABLE runs (key TEXT PRIMARY KEY, kind TEXT NOT NULL, model TEXT NOT NULL, dataset TEXT NOT NULL,
    problem INTEGER NOT NULL, seed INTEGER NOT NULL, digest TEXT NOT NULL, error TEXT, metrics TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, output BLOB NOT NULL, tokens BLOB, rows INTEGER NOT NULL, environment INTEGER,
    finished REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX runs_by_place ON runs (model, dataset, digest, kind);
"""


class ResultsError(KVPolicyError):
    """A results file cannot be read or written; what was written before is safe."""


@dataclass(frozen=True)
class Record:
    """A finished run, as it is in the file.

    Attributes:
        key, kind, model, dataset, problem, seed, digest: as in `Run`; `problem` is the number in the dataset.
        error: why it failed, or None.
        metrics: numbers by name.
        prompt_tokens: tokens of the prompt.
        output: the generated text.
    """

    key: str
    kind: str
    model: str
    dataset: str
    problem: int
    seed: int
    digest: str
    error: str | None
    metrics: dict[str, float]
    prompt_tokens: int
    output: str


@dataclass(frozen=True)
class CellRecord:
    """A variant on a dataset with a model, as it is in the file.

    Attributes:
        name, condition: as in `Variant`.
        settings: path -> value as text.
        model, dataset: where.
        policy: the policy in full, as YAML; None if it is not possible.
        digest: names the policy in the runs.
        error: why it is not possible.
    """

    name: str
    condition: str
    settings: dict[str, str]
    model: str
    dataset: str
    policy: str | None
    digest: str
    error: str | None


class Results:
    """A results file.

    Args:
        path: the file; made if it is not there and `study` is given.
        study: name of the study that writes; None opens for reading.

    Raises:
        ResultsError: there is no such file, it is of another version or another study, or cannot be opened.
    """

    def __init__(self, path: str | Path, study: str | None = None) -> None:
        self.path = Path(path)
        if study is None and not self.path.is_file():
            raise ResultsError(f"{self.path}: there is no such file; run the study first, or name its file with --out.")
        with self._said():
            self._open(study)
        found = self.meta("study")
        if study is not None and found not in (None, study):
            self.close()
            raise ResultsError(
                f"{self.path}: holds the results of study {found!r}, not of {study!r}; name another file with --out."
            )

    def _open(self, study: str | None) -> None:
        # A reader that may write tidies SQLite's side files away when it closes.
        mode = "rwc" if study is not None else "rw" if os.access(self.path, os.W_OK) else "ro"
        self._db = sqlite3.connect(f"{self.path.resolve().as_uri()}?mode={mode}", uri=True, timeout=30)
        application, version, tables = (
            self._db.execute(query).fetchone()[0]
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if not tables and study is not None:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(
                f"BEGIN; PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {VERSION}; {_SCHEMA} COMMIT;"
            )
            self.set_meta("study", study)
        elif not tables and not application:
            self._db.close()
            raise ResultsError(f"{self.path}: nothing is recorded in it yet; run the study first.")
        elif application != _APPLICATION:
            self._db.close()
            raise ResultsError(f"{self.path}: is not a results file of kvpolicy; name another file with --out.")
        elif version != VERSION:
            self._db.close()
            raise ResultsError(
                f"{self.path}: is a results file of version {version}, and this kvpolicy reads version {VERSION}; "
                "use the kvpolicy that wrote it, or name another file with --out."
            )
        self._db.execute("PRAGMA synchronous = FULL")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def _said(self) -> Iterator[None]:
        """Say in one sentence what SQLite complains of."""
        try:
            yield
        except sqlite3.Error as error:
            safe = "what was recorded before is safe, and the same command goes on from there"
            if "full" in str(error):
                raise ResultsError(f"{self.path}: the disk is full; make room ({safe}).") from error
            if "not a database" in str(error):
                raise ResultsError(
                    f"{self.path}: is not a results file of kvpolicy; name another file with --out."
                ) from error
            raise ResultsError(f"{self.path}: cannot be read or written ({error}); {safe}.") from error

    # -- writing ------------------------------------------------------------------------------------------------------

    def set_meta(self, name: str, value: str) -> None:
        """Note something about the study."""
        with self._said(), self._db:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def set_cells(self, cells: Sequence[Cell]) -> None:
        """Replace what the study compares; runs stay."""
        rows = [
            (
                *(i, cell.variant.name, cell.variant.condition, json.dumps(dict(cell.variant.settings))),
                *(cell.model, cell.dataset, None if cell.policy is None else cell.policy.to_yaml()),
                *(cell.digest, cell.error),
            )
            for i, cell in enumerate(cells)
        ]
        with self._said(), self._db:
            self._db.execute("DELETE FROM cells")
            self._db.executemany("INSERT INTO cells VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def environment(self, data: Mapping[str, Any]) -> int:
        """Return the number under which versions and machine are noted."""
        text = json.dumps(data, sort_keys=True)
        with self._said(), self._db:
            self._db.execute("INSERT OR IGNORE INTO environments (data) VALUES (?)", (text,))
            number: int = self._db.execute("SELECT id FROM environments WHERE data = ?", (text,)).fetchone()[0]
        return number

    def add(self, runs: Sequence[Run], outcomes: Sequence[Outcome], environment: int) -> None:
        """Append finished runs, all or none.

        Raises:
            ResultsError: the disk is full, or the file cannot be written.
        """
        now = time.time()
        problems, rows = [], []
        for run, outcome in zip(runs, outcomes, strict=True):
            problems.append(
                (run.dataset, run.problem.index, run.problem.prompt or run.problem.text, run.problem.answer)
            )
            # The tokens of the full cache's answers are the teachers of forced runs.
            keep = run.policy.policy == REFERENCE and run.kind == "generate"
            rows.append(
                (
                    *(run.key, run.kind, run.model.name, run.dataset, run.problem.index, run.seed, run.digest),
                    *(outcome.error, json.dumps(outcome.metrics, sort_keys=True), outcome.prompt_tokens),
                    *(_packed(outcome.output), _packed(json.dumps(outcome.tokens)) if keep else None),
                    *(len(runs), environment, now),
                )
            )
        with self._said(), self._db:
            self._db.executemany("INSERT OR IGNORE INTO problems VALUES (?, ?, ?, ?)", problems)
            self._db.executemany(
                "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
            )

    # -- reading ------------------------------------------------------------------------------------------------------

    def _query(self, query: str, values: Iterable[Any] = ()) -> list[Any]:
        with self._said():
            return self._db.execute(query, tuple(values)).fetchall()

    def meta(self, name: str) -> str | None:
        """Return what `set_meta` noted."""
        found = self._query("SELECT value FROM meta WHERE name = ?", (name,))
        return found[0][0] if found else None

    def finished(self, *, failed: bool) -> set[str]:
        """Return the keys of runs that succeeded, or that failed."""
        return {key for (key,) in self._query("SELECT key FROM runs WHERE (error IS NOT NULL) = ?", (failed,))}

    def teachers(self) -> dict[str, tuple[int, ...]]:
        """Return the answers of the full cache as tokens, by key."""
        found = self._query("SELECT key, tokens FROM runs WHERE tokens IS NOT NULL AND error IS NULL")
        return {key: tuple(json.loads(_unpacked(tokens))) for key, tokens in found}

    def lengths(self, keys: Iterable[str]) -> dict[str, int]:
        """Return prompt and answer together, in tokens, of those runs that are there and did not fail."""
        wanted = set(keys)
        found = self._query("SELECT key, prompt_tokens, metrics FROM runs WHERE kind = 'generate' AND error IS NULL")
        return {key: prompt + int(json.loads(m)["tokens"]) for key, prompt, m in found if key in wanted}

    def cells(self) -> list[CellRecord]:
        """Return what the study compares, in the order of its file, the full cache first."""
        rows = self._query(
            "SELECT name, condition, settings, model, dataset, policy, digest, error FROM cells ORDER BY position"
        )
        return [CellRecord(row[0], row[1], json.loads(row[2]), *row[3:8]) for row in rows]

    def records(self) -> list[Record]:
        """Return all runs, ordered by what they are, not by when they finished."""
        rows = self._query(
            "SELECT key, kind, model, dataset, problem, seed, digest, error, metrics, prompt_tokens, output FROM runs "
            "ORDER BY model, dataset, digest, kind, seed, problem, key"
        )
        names = ("key", "kind", "model", "dataset", "problem", "seed", "digest", "error")
        return [
            Record(
                **dict(zip(names, row[:8], strict=True)),
                metrics=json.loads(row[8]),
                prompt_tokens=row[9],
                output=_unpacked(row[10]),
            )
            for row in rows
        ]

    def problems(self) -> dict[tuple[str, int], tuple[str, str]]:
        """Return (prompt, answer) by dataset and number."""
        return {(row[0], row[1]): (row[2], row[3]) for row in self._query("SELECT * FROM problems")}

    def environments(self) -> list[dict[str, Any]]:
        """Return versions and machines that runs were made with."""
        return [json.loads(data) for (data,) in self._query("SELECT data FROM environments ORDER BY id")]


def _packed(text: str) -> bytes:
    return zlib.compress(text.encode(), 6)


def _unpacked(data: bytes) -> str:
    return zlib.decompress(data).decode()
