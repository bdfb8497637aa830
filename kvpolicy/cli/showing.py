"""`kvpolicy show`."""

from __future__ import annotations

import json
from typing import Any

from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

import kvpolicy
from kvpolicy.cli.listing import summary
from kvpolicy.cli.terminal import output
from kvpolicy.contracts.components import kind_of
from kvpolicy.spec import ComponentRef, PolicySpec


def print_policy(name_or_file: str) -> None:
    """Print a policy in full; raises KVPolicyError when there is none or it is not valid."""
    spec = kvpolicy.load(name_or_file)
    console = output()
    console.print(Text.assemble((spec.policy, "bold"), f"  {spec.description}".rstrip()))
    if spec.paper:
        console.print(f"paper: {spec.paper}")
    if spec.departures:
        console.print("departures from the paper:")
        for departure in spec.departures:
            console.print(Padding(f"- {departure}", (0, 0, 0, 2), expand=False))
    console.print()
    short = spec.model_copy(update={"description": "", "departures": ()})
    if console.is_terminal:
        console.print(Syntax(short.to_yaml().rstrip(), "yaml", background_color="default", word_wrap=True))
    else:
        console.file.write(short.to_yaml())
    console.print()
    console.print(_parameters(spec))


def _parameters(spec: PolicySpec) -> Table:
    table = Table("part", "parameter", "value", "allowed", "meaning", box=None, pad_edge=False, header_style="bold")
    parts = [("trigger", spec.trigger), *(("protect", ref) for ref in spec.protect)]
    parts += [(kind, getattr(spec, kind)) for kind in ("importance", "redundancy", "mixer", "allocator", "selector")]
    parts += [("post", ref) for ref in spec.post]
    catalog = kvpolicy.catalog()
    for part, ref in parts:
        origin = catalog.entry("protection" if part == "protect" else part, ref.use).origin
        source = f"[{origin.distribution} {origin.version}]".replace(" ]", "]")
        table.add_row(_bold(part), _bold(ref.use), "", "", f"{summary(type(ref.component))} {source}")
        for row in _rows(ref):
            table.add_row("", *row)
    return table


def _bold(text: str) -> Text:
    return Text(text, "bold")


def _rows(ref: ComponentRef, depth: int = 1) -> list[tuple[str, str | Text, str, str]]:
    properties = type(ref.component).model_json_schema().get("properties", {})
    rows: list[tuple[str, str | Text, str, str]] = []
    held = ref.held
    for name, value in ref.params.items():
        schema = properties[name]
        if name in held:
            what = f"{schema.get('description', '')} Here: {summary(type(held[name].component))}.".strip()
            kind = f"a component: {kind_of(type(held[name].component))}"
            rows.append((f"{'  ' * depth}{name}", _bold(held[name].use), kind, what))
            rows += _rows(held[name], depth + 1)
            continue
        shown = _text(value)
        if "default" in schema and value != schema["default"]:
            shown += f" (default {_text(schema['default'])})"
        rows.append((f"{'  ' * depth}{name}", shown, allowed(schema), schema.get("description", "")))
    return rows


def _text(value: Any) -> str:
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
