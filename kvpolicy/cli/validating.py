"""`kvpolicy validate`."""

from __future__ import annotations

from pathlib import Path

import kvpolicy
from kvpolicy.cli.named import meanings
from kvpolicy.errors import KVPolicyError, SpecError
from kvpolicy.loading.entries import with_article
from kvpolicy.tables import registered


def found_valid(name_or_file: str) -> list[str]:
    """Return a line for everything that a name or a file stands for and that is valid.

    Raises:
        KVPolicyError: something is wrong with it, or it is nothing that is written in a file.
    """
    return [_checked(kind, name, name_or_file) for kind, name in meanings(name_or_file)]


def sentences(error: KVPolicyError) -> list[str]:
    """Return what is wrong, a line each."""
    problems = error.problems if isinstance(error, SpecError) else (str(error),)
    return [" ".join(problem.split()) for problem in problems]


def _checked(kind: str, name: str | Path, given: str) -> str:
    if kind == "policy":
        return f"{given}: policy {kvpolicy.load(name).policy} is valid."
    if kind == "study":
        from kvpolicy.study.spec import find_study

        return f"{given}: study {find_study(name).study} is valid."
    if kind == "table":
        table = dict(registered())[str(name)]
        if isinstance(table, KVPolicyError):
            raise table
        return f"{given}: table {name} is valid."
    raise KVPolicyError(
        f"{given}: is {with_article(kind)}, which has no file; `kvpolicy show {given}` shows its parameters"
        + ("." if kind == "backend" else f" and `kvpolicy check {given}` checks what it does.")
    )
