"""What a name on the command line stands for."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator
from pathlib import Path

import kvpolicy
from kvpolicy.errors import KVPolicyError, SpecError
from kvpolicy.inputs import expanded
from kvpolicy.loading.entries import KINDS_OF_ENTRIES, Catalog
from kvpolicy.spec import files, yaml_text
from kvpolicy.spec.forms import REFERENCES


def meanings(text: str) -> list[tuple[str, str | Path]]:
    """Return what a name stands for, as (kind, name): everything that is registered under it, or a file.

    Args:
        text: a name of anything that `kvpolicy list` shows, ``kind.name`` where a name alone says too much, or a path.

    Raises:
        UnknownComponentError: nothing has that name.
    """
    catalog = kvpolicy.catalog()
    found: list[tuple[str, str | Path]] = [*_registered(text, catalog)]
    if found:
        return found
    _lead_to_part(text, catalog)
    if "/" in text or os.sep in text or text.endswith(files.SUFFIXES):
        path = expanded(text)
        return [(kind_of_file(path), path)]
    path = Path(files.find(text, catalog).source)
    return [(kind_of_file(path), path)]


def _registered(text: str, catalog: Catalog) -> Iterator[tuple[str, str]]:
    first, _, rest = text.partition(".")
    for kind in KINDS_OF_ENTRIES:
        names = catalog.names(kind)
        if text in names:
            yield kind, text
        if kind == first and rest in names:
            yield kind, rest


def _lead_to_part(text: str, catalog: Catalog) -> None:
    """Say which component is meant by a policy's name and a kind, as in ``mixkv-mixer``; raises KVPolicyError."""
    named = re.fullmatch(rf"(.+)[-_. ]({'|'.join(REFERENCES)})", text)
    if named is not None and named[1] in catalog.names("policy"):
        kind, use = named[2], getattr(kvpolicy.load(named[1]), named[2]).use
        raise KVPolicyError(f"{text!r} is no name; the {kind} of policy {named[1]!r} is {use!r}: write {kind}.{use}.")


def kind_of_file(path: Path) -> str:
    """Return ``study`` for a file that says so, ``policy`` for any other: whoever reads it says what is wrong."""
    try:
        text = yaml_text.read_file(path)
    except SpecError:
        return "policy"
    try:
        data: Container[str] = yaml_text.scan(text, str(path)).data
    except SpecError:  # of what cannot be read, a line says it
        data = re.findall(r"^(\w+):", text, re.MULTILINE)
    return "study" if "kind" in data or ("study" in data and "policy" not in data) else "policy"
