"""Rows with named fields, read through the library `datasets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvpolicy.errors import KVPolicyError, did_you_mean
from kvpolicy.inputs import require_ordinary
from kvpolicy.study.extra import library


def load_rows(*args: Any, where: str, **kwargs: Any) -> Any:
    """Call `datasets.load_dataset`; raises KVPolicyError in one sentence."""
    datasets = library("datasets", f"datasets: {where} needs")
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*args, **kwargs)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:300].rstrip(".") or type(cause).__name__
        raise KVPolicyError(f"datasets: {where} cannot be read: {reason}.") from error


def json_lines(path: str) -> Any:
    """Return the rows of a local JSON Lines file; raises KVPolicyError."""
    return load_rows("json", data_files=existing(path), split="train", where=path)


def existing(path: str) -> str:
    """Return the path of a file; raises KVPolicyError if there is none, or nothing in it."""
    if not Path(path).exists():
        raise KVPolicyError(f"datasets: there is no file {path}; correct `path`, which is relative to the study file.")
    require_ordinary(Path(path), "text file", option="datasets")
    with Path(path).open(encoding="utf-8", errors="replace") as lines:
        empty = not any(line.strip() for line in lines)  # stops at the first that is not
    if empty:
        raise KVPolicyError(f"datasets: {path} is empty; name another file.")
    return path


def require_fields(found: Sequence[str], wanted: Mapping[str, str], where: str) -> None:
    """Raise KVPolicyError if one of the wanted fields (parameter -> field) is not among those found."""
    for role, name in wanted.items():
        if name not in found:
            raise KVPolicyError(
                f"datasets: {where} has no field {name!r} for `{role}`.{did_you_mean(name, found)} "
                f"Its fields are {', '.join(found)}; write `{role}: FIELD`."
            )


def column(rows: Any, field: str, where: str) -> list[str]:
    """Return one field of all rows as texts; raises KVPolicyError if there is no such field."""
    require_fields(rows.column_names, {"field": field}, where)
    return [str(text) for text in rows[field]]
