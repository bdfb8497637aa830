"""`kvpolicy list`."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from rich.table import Table as Rows
from rich.text import Text

import kvpolicy
from kvpolicy.cli.terminal import output
from kvpolicy.contracts.components import KINDS, Component
from kvpolicy.errors import KVPolicyError, SpecError, TableError, did_you_mean
from kvpolicy.loading.entries import Catalog, Origin
from kvpolicy.spec import files
from kvpolicy.tables import Table, registered


def print_list(kind: str | None, *, as_json: bool) -> None:
    """Print what is installed, and what could not be loaded; raises KVPolicyError for an unknown kind."""
    kinds = ["policy", *KINDS, "study", "table"]
    if kind is not None and kind not in kinds:
        raise KVPolicyError(f"--kind: {kind!r} is not a kind.{did_you_mean(kind, kinds)} Kinds: {', '.join(kinds)}.")
    catalog = kvpolicy.catalog()
    rows = [row for row in _rows(catalog) if kind in (None, row["kind"])]
    left_out = [{"plugin": str(failure.origin), "error": str(failure.error)} for failure in catalog.failures]
    off = [str(origin) for origin in catalog.disabled]
    console = output()
    if as_json:
        text = json.dumps({"entries": rows, "failed_plugins": left_out, "disabled_plugins": off}, indent=2)
        console.file.write(text + "\n")
        return
    table = Rows("kind", "name", "what it is", "from", box=None, pad_edge=False, header_style="bold")
    last = None
    for row in rows:
        table.add_row(row["kind"] if row["kind"] != last else "", row["name"], row["summary"], row["from"])
        last = row["kind"]
    console.print(table)
    for failure in left_out:
        console.print(Text.assemble(("not loaded:", "red"), " ", failure["error"]))
    for origin in off:
        console.print(Text.assemble(("turned off:", "yellow"), f" plugin {origin}"))


def summary(component: type[Component]) -> str:
    """Return the first sentence of a component's own docstring."""
    return first_sentence(inspect.cleandoc(component.__dict__.get("__doc__") or "").split("\n\n")[0])


def first_sentence(text: str) -> str:
    """Return the text up to the first full stop or question mark that a capital follows, on one line."""
    return re.split(r"(?<=[.?])\s+(?=[A-Z])", " ".join(text.split()), maxsplit=1)[0].rstrip(".").replace("``", "`")


def _rows(catalog: Catalog) -> list[dict[str, Any]]:
    found = {entry.name: entry.origin for entry in catalog.policies()}
    for name, path in files.in_folders().items():
        found.setdefault(name, Origin(str(path)))
    rows = [_row("policy", name, _described(name), origin) for name, origin in found.items()]
    rows += [_row(e.kind, e.name, summary(e.component), e.origin) for e in catalog.entries()]
    rows += [_row("study", entry.name, _asked(entry.name), entry.origin) for entry in catalog.studies()]
    tables = dict(registered())
    rows += [_row("table", entry.name, _measured(tables[entry.name]), entry.origin) for entry in catalog.tables()]
    return rows


def _measured(table: Table | TableError) -> str:
    if isinstance(table, TableError):
        return f"not valid: {table}"
    what = table.notes.get("measured")
    return f"{table.kind} of {table.model}" + (f": {what}" if what else "")


def _described(policy: str) -> str:
    try:
        return first_sentence(kvpolicy.load(policy).description)
    except SpecError as error:
        return f"not valid: {error}"


def _asked(study: str) -> str:
    from kvpolicy.study.spec import find_study

    try:
        return first_sentence(find_study(study).description)
    except SpecError as error:
        return f"not valid: {error}"


def _row(kind: str, name: str, text: str, origin: Origin) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        "summary": text,
        "from": f"{origin.distribution} {origin.version}".strip(),
        "distribution": origin.distribution,
        "version": origin.version,
        "plugin": origin.plugin,
    }
