"""`kvpolicy list`."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from rich.table import Table as Rows
from rich.text import Text

import kvpolicy
from kvpolicy.cli.terminal import output
from kvpolicy.contracts.backend import Backend
from kvpolicy.contracts.components import Component
from kvpolicy.errors import KVPolicyError, SpecError, TableError, did_you_mean
from kvpolicy.loading.entries import KINDS_OF_ENTRIES, Catalog, Entry, Origin, led, not_installed, same_package, shown
from kvpolicy.loading.presses import lead
from kvpolicy.spec import PolicySpec, files, yaml_text
from kvpolicy.tables import Table, registered

_PHASES: Final = ("prefill", "decode")


@dataclass(frozen=True)
class Filter:
    """What is listed.

    Attributes:
        words: all of them stand in a line.
        kind: only this kind.
        runs: only policies that compact in this phase.
        package: only what comes from this package.
    """

    words: tuple[str, ...] = ()
    kind: str | None = None
    runs: str | None = None
    package: str | None = None

    def check(self) -> None:
        """Raise KVPolicyError when a kind or a phase is none."""
        for option, value, known in (("--kind", self.kind, KINDS_OF_ENTRIES), ("--runs", self.runs, _PHASES)):
            if value is not None and value not in known:
                what = f"{option}: {value!r} is not a {'kind' if option == '--kind' else 'phase'}."
                raise KVPolicyError(f"{what}{did_you_mean(value, known)} Known: {', '.join(known)}.")
        if self.runs is not None and self.kind not in (None, "policy"):
            raise KVPolicyError(f"--runs: says when a policy compacts; leave it out, or --kind {self.kind}.")

    def takes(self, row: dict[str, Any]) -> bool:
        """Whether a row is listed."""
        line = " ".join((row["kind"], row["name"], row.get("runs", ""), row["summary"])).lower()
        return (
            self.kind in (None, row["kind"])
            and (self.runs is None or row.get("runs") in (self.runs, "both"))
            and (self.package is None or same_package(self.package, row["distribution"]))
            and all(word.lower() in line for word in self.words)
        )


def print_list(chosen: Filter, *, as_json: bool) -> None:
    """Print what is installed, and what could not be loaded; raises KVPolicyError for an unknown kind or phase."""
    chosen.check()
    catalog = kvpolicy.catalog()
    kinds = KINDS_OF_ENTRIES if chosen.kind is None and chosen.runs is None else (chosen.kind or "policy",)
    rows = [row for kind in kinds for row in _rows(kind, catalog) if chosen.takes(row)]
    left_out = [{"plugin": str(failure.origin), "error": str(failure.error)} for failure in catalog.failures]
    off = [str(origin) for origin in catalog.disabled]
    console = output()
    if as_json:
        text = json.dumps({"entries": rows, "failed_plugins": left_out, "disabled_plugins": off}, indent=2)
        console.file.write(text + "\n")
        return
    if rows:
        console.print(_table(rows))
    else:
        console.print("Nothing that is registered fits; `kvpolicy list` without arguments shows everything.")
        for said in filter(None, (_meant(word, catalog) for word in chosen.words)):
            console.print(said, soft_wrap=True)
    for failure in left_out:
        console.print(Text.assemble(("not loaded:", "red"), " ", failure["error"]))
    for origin in off:
        console.print(Text.assemble(("turned off:", "yellow"), f" plugin {origin}"))


def _meant(word: str, catalog: Catalog) -> str:
    """Return a sentence that leads from a word that nothing fits to what was probably looked for, or an empty text."""
    near = led(word, {kind: catalog.names(kind) for kind in KINDS_OF_ENTRIES})
    return lead(word) or not_installed(word) or (f"{shown(word)}:{near}" if near else "")


def _table(rows: list[dict[str, Any]]) -> Rows:
    """Return a table with the columns that tell rows apart."""
    table = Rows(box=None, pad_edge=False, header_style="bold")
    table.add_column("kind")
    table.add_column("name", overflow="fold")
    runs = any("runs" in row for row in rows)
    if runs:
        table.add_column("runs")
    table.add_column("what it is", ratio=1)
    sources = {row["from"] for row in rows}
    if len(sources) > 1:
        table.add_column("from")
    else:
        table.caption = Text(f"All from {sources.pop()}.")
        table.caption_justify = "left"
    last = None
    for row in rows:
        cells = [
            row["kind"] if row["kind"] != last else "",
            row["name"],
            row.get("runs", ""),
            row["summary"],
            row["from"],
        ]
        wanted = [True, True, runs, True, table.caption is None]
        table.add_row(*(cell for cell, shown in zip(cells, wanted, strict=True) if shown))
        last = row["kind"]
    return table


def summary(component: type[Component | Backend]) -> str:
    """Return the first sentence of the own docstring of a component's or a backend's class."""
    return first_sentence(inspect.cleandoc(component.__dict__.get("__doc__") or "").split("\n\n")[0])


def first_sentence(text: str) -> str:
    """Return the text up to the first full stop or question mark that a capital follows, on one line."""
    return re.split(r"(?<=[.?])\s+(?=[A-Z])", " ".join(text.split()), maxsplit=1)[0].rstrip(".").replace("``", "`")


def runs_at(spec: PolicySpec) -> str:
    """Return when a policy compacts: ``prefill``, ``decode``, ``both`` or ``never``."""
    return "never" if spec.budget.fraction == 1.0 else spec.phase


def _rows(kind: str, catalog: Catalog) -> Iterator[dict[str, Any]]:
    if kind == "policy":
        found = {entry.name: entry.origin for entry in catalog.policies()}
        for name, path in files.in_folders().items():
            found.setdefault(name, Origin(str(path)))
        for name, origin in found.items():
            yield _row(kind, name, origin, **_policy(name))
    elif kind == "study":
        for entry in catalog.studies():
            yield _row(kind, entry.name, entry.origin, summary=_asked(entry))
    elif kind == "table":
        tables = dict(registered())
        for entry in catalog.tables():
            yield _row(kind, entry.name, entry.origin, summary=_measured(tables[entry.name]))
    elif kind == "backend":
        for entry in (each for each in catalog if each.kind == kind):  # as `auto` asks them
            yield _row(kind, entry.name, entry.origin, summary=summary(type(entry.value)))
    else:
        for entry in catalog.entries(kind):
            yield _row(kind, entry.name, entry.origin, summary=summary(entry.component))


def _policy(name: str) -> dict[str, str]:
    try:
        spec = kvpolicy.load(name)
    except SpecError as error:
        return {"runs": "", "summary": f"not valid: {error}"}
    return {"runs": runs_at(spec), "summary": first_sentence(spec.description)}


def _asked(entry: Entry) -> str:
    """Return what a study asks; whether all else in its file is right is for those who show or run it."""
    try:
        found = files.Found.of_entry(entry)
        text = yaml_text.parse(found.text, found.source, "study").data.get("description", "")
    except SpecError as error:
        return f"not valid: {error}"
    return first_sentence(str(text))


def _measured(table: Table | TableError) -> str:
    if isinstance(table, TableError):
        return f"not valid: {table}"
    what = table.notes.get("measured")
    return f"{table.kind} of {table.model}" + (f": {what}" if what else "")


def _row(kind: str, name: str, origin: Origin, **said: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        **said,
        "from": f"{origin.distribution} {origin.version}".strip(),
        "distribution": origin.distribution,
        "version": origin.version,
        "plugin": origin.plugin,
    }
