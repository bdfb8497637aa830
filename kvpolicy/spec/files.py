"""Finds policy files by name or path and follows `extends`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvpolicy.errors import SpecError
from kvpolicy.inputs import expanded, shortened
from kvpolicy.loading.entries import Catalog, Entry
from kvpolicy.spec import forms, yaml_text
from kvpolicy.spec.problems import FieldError, Problems, shown, together
from kvpolicy.spec.yaml_text import Document

SEARCH_VARIABLE: Final = "KVPOLICY_POLICY_PATH"
"""Environment variable: folders with policy files, separated as in PATH."""

SUFFIXES: Final = (".yaml", ".yml")

MAX_EXTENDS: Final = 32
"""Files that one file may extend, one through the other."""

Search = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""One folder or several."""


@dataclass(frozen=True)
class Found:
    """The text of a policy, what errors call it, and its folder."""

    text: str
    source: str
    folder: Path | None = None
    registered: str | None = None

    @classmethod
    def of_text(cls, text: str, source: str) -> Found:
        """Take a text; a source that is the path of a file gives the folder for relative paths."""
        try:
            folder = Path(source).parent if Path(source).is_file() else None
        except (OSError, ValueError):
            folder = None
        return cls(text, source, folder)

    @classmethod
    def of_path(cls, path: Path) -> Found:
        """Read a file; raises SpecError."""
        return cls(yaml_text.read_file(path), str(path), path.parent)

    @classmethod
    def of_entry(cls, entry: Entry) -> Found:
        """Take a registered policy; raises SpecError when its file cannot be read."""
        if entry.path is not None:
            return cls(yaml_text.read_file(entry.path), str(entry.path), entry.path.parent, entry.name)
        return cls(entry.text or "", f"<{entry.name} of {entry.origin}>", None, entry.name)

    @property
    def identity(self) -> str:
        """The same for the same file."""
        return self.source if self.folder is None else str(Path(self.source).resolve())


def find(name: str | os.PathLike[str], catalog: Catalog, search: Search = (), folder: Path | None = None) -> Found:
    """Find a policy: a registered name, then a path, then a name in the folders of `search` and KVPOLICY_POLICY_PATH.

    Args:
        name: the name or the path; what ends in .yaml or .yml or contains a slash is a path, as is any `os.PathLike`.
        catalog: knows the registered policies.
        search: folders that are looked through before those of the environment variable.
        folder: what a relative path is relative to; the working directory if None.

    Raises:
        UnknownComponentError: nothing has that name.
        SpecError: the path is not a readable text file.
    """
    text = os.fspath(name) if isinstance(name, str | os.PathLike) else name
    if not isinstance(text, str) or not text or "\0" in text or (isinstance(name, str) and not name.isprintable()):
        raise SpecError(f"{shown(text)} is not the name or path of a policy.")
    is_path = not isinstance(name, str) or "/" in text or os.sep in text or text.endswith(SUFFIXES)
    if is_path:
        return Found.of_path((folder or Path()) / expanded(text))
    registered = {entry.name: entry for entry in catalog.policies()}
    if text in registered:
        return Found.of_entry(registered[text])
    listed = in_folders(search)
    if text in listed:
        return Found.of_path(listed[text])
    try:
        is_file = Path(text).is_file()
    except OSError:  # too long for a name
        is_file = False
    if is_file:
        return Found.of_path(Path(text))
    raise catalog.unknown("policy", text, {*registered, *listed})


def in_folders(search: Search = ()) -> dict[str, Path]:
    """Return the policy files in the folders of `search` and KVPOLICY_POLICY_PATH by name; the first folder wins."""
    given = [search] if isinstance(search, str | os.PathLike) else list(search)
    listed = [part for part in os.environ.get(SEARCH_VARIABLE, "").split(os.pathsep) if part]
    found: dict[str, Path] = {}
    for folder in map(expanded, (*given, *listed)):
        try:
            paths = sorted(folder.iterdir())
        except (OSError, ValueError) as error:
            reason = "there is no such folder" if not isinstance(error, PermissionError) else "cannot be looked through"
            raise SpecError(f"{shortened(folder)}: {reason}; correct `search` or {SEARCH_VARIABLE}.") from None
        for path in paths:
            if path.suffix in SUFFIXES:
                found.setdefault(path.stem, path)
    return found


OWN: Final = ("description", "paper", "departures")
"""What a policy says of itself, and not of those that extend it."""


def resolved(
    document: Document,
    found: Found,
    catalog: Catalog,
    search: Search = (),
    *,
    problems: Problems,
    chain: tuple[Found, ...] = (),
) -> tuple[dict[str, Any], forms.Marks]:
    """Return the canonical mapping of a file and all that it extends, and its marks.

    Args:
        document: the file, or a policy that is part of another file.
        found: the file that it stands in.
        catalog: knows the names.
        search: further folders with policies.
        problems: takes what is wrong in this document; what is wrong is left out of the mapping.
        chain: the files that extend this one.

    Raises:
        SpecError: a base cannot be read, with the place.
        FieldError: there is no such base, or something is wrong in it.
    """
    data, marks = document.readable, document.marks
    if "policy" not in data and data.get("kind") == "study":  # then no field is where it belongs
        raise FieldError(("kind",), "says that this is a study, which `kvpolicy study` takes; name a policy file.")
    _check_head(document, found, problems)
    overlay = forms.Canonical(
        {field: value for field, value in data.items() if field != "extends"}, catalog, marks, problems=problems
    )
    if "extends" not in data:
        if "extends" in document.data:  # it cannot be read, and what the rest means is not known without it
            raise together(problems.found)
        overlay.present(source=found.source)
        return forms.unfold(overlay.data, catalog), overlay.marks
    try:
        base = _base(data["extends"], found, catalog, search, (*chain, found))
    except FieldError as problem:  # what the rest means is not known without it
        raise together([*problems.found, problem]) from None
    read = yaml_text.scan(base.text, base.source)
    beneath = Problems(read.faults)
    try:
        base_data, base_marks = resolved(read, base, catalog, search, problems=beneath, chain=(*chain, found))
        beneath.check()
    except FieldError as problem:
        raise together([*problems.found, *problem.placed(read.marks)]) from None
    overlay.present(base_data, found.source)
    inherited = {field: value for field, value in base_data.items() if field not in OWN}
    merged, marks = forms.merge(inherited, overlay.data, base_marks, overlay.marks)
    return forms.unfold(merged, catalog), marks


def _base(extends: Any, found: Found, catalog: Catalog, search: Search, chain: tuple[Found, ...]) -> Found:
    at = ("extends",)
    if not isinstance(extends, str) or not extends:
        raise FieldError(at, f"should be the name or the path of one policy, got {shown(extends)}.")
    try:
        base = find(extends, catalog, search, found.folder)
    except SpecError as error:
        raise FieldError(at, str(error), type(error)) from None
    if len(chain) > MAX_EXTENDS:
        raise FieldError(
            at, f"leads through more than {MAX_EXTENDS} files; write one of them out (`kvpolicy show` prints it whole)."
        )
    if base.identity in {link.identity for link in chain}:
        circle = " -> ".join(link.source for link in (*chain, base))
        raise FieldError(at, f"makes a circle ({circle}); let one of them stand alone.")
    return base


def _check_head(document: Document, found: Found, problems: Problems) -> None:
    data = document.data
    with problems:
        check_version(data)
    with problems:
        if "policy" not in data:
            raise FieldError(
                ("policy",), "is missing; give the policy a name of its own, such as `policy: my-variant`."
            )
        if found.registered is not None and data["policy"] != found.registered:
            raise FieldError(
                ("policy",),
                f"is {shown(data['policy'])}, but the file is registered as {found.registered!r}; use one name.",
            )


def check_version(data: Mapping[str, Any]) -> None:
    """Raise FieldError when a file's version is missing or is not 1."""
    at = ("schema_version",)
    if "schema_version" not in data:
        raise FieldError(at, "is missing; write `schema_version: 1` in the first line.")
    version = data["schema_version"]
    if version is True or version != 1 or not isinstance(version, int):
        raise FieldError(at, f"{shown(version)} is not known here; this kvpolicy reads `schema_version: 1`.")
