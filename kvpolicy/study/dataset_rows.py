"""Rows with named fields, read through the library `datasets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kvpolicy.errors import KVPolicyError, UnreachableError, did_you_mean
from kvpolicy.inputs import require_ordinary
from kvpolicy.study.extra import library


def load_rows(*args: Any, where: str, **kwargs: Any) -> Any:
    """Call `datasets.load_dataset`; raises KVPolicyError in one sentence, UnreachableError for the hub's."""
    datasets = library("datasets", f"datasets: {where} needs")
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*args, **kwargs)
    except Exception as error:
        if "data_files" in kwargs:
            raise KVPolicyError(f"datasets: {where} cannot be read: {_reason(error)}.") from error
        raise unreachable(error, args[0], where) from error


def hub_file(identifier: str, name: str, revision: str | None = None) -> Path:
    """Return a file of a data set on the hub, fetched once; raises UnreachableError."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(identifier, name, repo_type="dataset", revision=revision))
    except Exception as error:
        raise unreachable(error, identifier, f"{identifier}, file {name}") from error


def unreachable(error: Exception, identifier: str, where: str) -> UnreachableError:
    """Return the error that says why a data set of the hub cannot be had, and what to do."""
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    if any(type(each).__name__ == "GatedRepoError" or "gated dataset" in str(each) for each in chain):
        return UnreachableError(
            f"datasets: {where} is gated, and access to it has not been given; ask for it on "
            f"https://huggingface.co/datasets/{identifier}, log in with `hf auth login`, or name a local copy as "
            "`path`."
        )
    return UnreachableError(
        f"datasets: {where} cannot be read: {_reason(error)}; name a local copy as `path` where there is one."
    )


def _reason(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return " ".join(str(cause).split())[:300].rstrip(".") or type(cause).__name__


def json_lines(path: str) -> Any:
    """Return the rows of a local JSON Lines file; raises KVPolicyError."""
    return load_rows("json", data_files=existing(path), split="train", where=path)


_READERS: Final[Mapping[str, str]] = {".csv": "csv", ".parquet": "parquet"}


def local_rows(path: str) -> Any:
    """Return the rows of a local file: CSV and Parquet by their endings, all else as JSON; raises KVPolicyError."""
    reader = _READERS.get(Path(path).suffix.lower(), "json")
    return load_rows(reader, data_files=existing(path), split="train", where=path)


def together(tables: Sequence[Any], where: str) -> Any:
    """Return the rows of several tables, one after the other; raises KVPolicyError if their fields differ."""
    if len(tables) == 1:
        return tables[0]
    datasets = library("datasets", f"datasets: {where} needs")
    common = set(tables[0].column_names).intersection(*(table.column_names for table in tables))
    try:
        return datasets.concatenate_datasets([table.select_columns(sorted(common)) for table in tables])
    except Exception as error:
        raise KVPolicyError(
            f"datasets: {where} do not belong together: {_reason(error)}; name files of one format."
        ) from error


def paths(value: str | Sequence[str]) -> list[str]:
    """Return the files that a `path` names, one or several."""
    return [value] if isinstance(value, str) else list(value)


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
    """Return one field of all rows as texts; raises KVPolicyError if there is no such field, or a row lacks it."""
    require_fields(rows.column_names, {"field": field}, where)
    return [text_of({field: text}, field, row, where) for row, text in enumerate(rows[field])]


def text_of(fields: Mapping[str, Any], field: str, row: int, where: str) -> str:
    """Return a field of a row, counted from 0, as a text; raises KVPolicyError if nothing stands there."""
    if fields[field] is None:
        raise KVPolicyError(
            f"datasets: {where}, row {row + 1}, has nothing in its field {field!r}; complete it, or take it out."
        )
    return str(fields[field])
