"""`kvpolicy show`: a policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import kvpolicy
from kvpolicy.cli.listing import summary
from kvpolicy.cli.terminal import output
from kvpolicy.contracts.components import kind_of
from kvpolicy.loading.entries import BUNDLED
from kvpolicy.spec import ComponentRef, PolicySpec, files, yaml_text


def print_policy(name_or_file: str | Path) -> None:
    """Print a policy in full; raises KVPolicyError when there is none or it is not valid."""
    spec = kvpolicy.load(name_or_file)
    console = output()
    console.print(Text.assemble((spec.policy, "bold"), f"  {spec.description}".rstrip()))
    base = _base(name_or_file)
    if base is not None:
        console.print(f"extends: {base}")
    if spec.paper:
        console.print(f"paper: {spec.paper}")
    if spec.departures:
        console.print("departures from the paper:")
        for departure in spec.departures:
            console.print(Padding(f"- {departure}", (0, 0, 0, 2), expand=False))
    console.print()
    short = spec.model_copy(update={"description": "", "departures": ()})
    if console.is_terminal:
        from rich.syntax import Syntax

        console.print(Syntax(short.to_yaml().rstrip(), "yaml", background_color="default", word_wrap=True))
    else:
        console.file.write(short.to_yaml())
    console.print()
    console.print(_parameters(spec))


def _parameters(spec: PolicySpec) -> Table:
    table = columns("part", "value", "allowed")
    parts = [("trigger", spec.trigger), *(("protect", ref) for ref in spec.protect)]
    parts += [(kind, getattr(spec, kind)) for kind in ("importance", "redundancy", "mixer", "allocator", "selector")]
    parts += [("post", ref) for ref in spec.post]
    catalog = kvpolicy.catalog()
    for part, ref in parts:
        origin = catalog.entry("protection" if part == "protect" else part, ref.use).origin
        # What is bundled needs no source.
        source = (
            "" if origin.distribution == BUNDLED else f" [{origin.distribution} {origin.version}]".replace(" ]", "]")
        )
        table.add_row(_bold(part), _bold(ref.use), "", f"{summary(type(ref.component))}{source}")
        for row in parameter_rows(ref):
            table.add_row(*row)
    return table


def _base(name_or_file: str | Path) -> str | None:
    """Return what the policy's file extends, as it is written there, with the paper of that policy."""
    found = files.find(name_or_file, kvpolicy.catalog())
    named = yaml_text.parse(found.text, found.source).data.get("extends")
    if named is None:
        return None
    base = files.find(named, kvpolicy.catalog(), (), found.folder)
    paper = PolicySpec.read_found(base).paper
    return f"{named} ({paper})" if paper else str(named)


def columns(*names: str) -> Table:
    """Return an empty table with these columns, and a last one for what they mean."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold")
    table.add_column("meaning")
    return table


def _bold(text: str) -> Text:
    return Text(text, "bold")


def parameter_rows(ref: ComponentRef, depth: int = 1) -> list[tuple[str, str | Text, str, str]]:
    """Return name, value, allowed values and meaning of each parameter, those of components that it holds indented."""
    properties = type(ref.component).model_json_schema().get("properties", {})
    rows: list[tuple[str, str | Text, str, str]] = []
    held = ref.held
    for name, value in ref.params.items():
        schema = properties[name]
        if name in held:
            what = f"{schema.get('description', '')} Here: {summary(type(held[name].component))}.".strip()
            kind = f"a component: {kind_of(type(held[name].component))}"
            rows.append((f"{'  ' * depth}{name}", _bold(held[name].use), kind, what))
            rows += parameter_rows(held[name], depth + 1)
            continue
        written = shown(value)
        if "default" in schema and value != schema["default"]:
            written += f" (default {shown(schema['default'])})"
        rows.append((f"{'  ' * depth}{name}", written, allowed(schema), schema.get("description", "")))
    return rows


def shown(value: Any) -> str:
    """Return a value as a file has it."""
    return value if isinstance(value, str) else json.dumps(value)


def allowed(schema: dict[str, Any]) -> str:
    """Return the values that a JSON schema allows, in short: ``integer >= 1``, ``max | mean``."""
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "anyOf" in schema:
        return " | ".join(allowed(option) for option in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return " ".join([str(schema.get("type", "")), ", ".join(bounds)]).strip()
