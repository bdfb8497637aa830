"""The JSON schema of policy files (draft 2020-12), with every registered component, those of third parties included."""

from __future__ import annotations

import inspect
import warnings
from types import NoneType
from typing import Any, Final, get_args

from pydantic.fields import FieldInfo
from pydantic.json_schema import PydanticJsonSchemaWarning

from kvpolicy.contracts.budget import Budget
from kvpolicy.contracts.component import LONGEST_TEXT, descriptions, has_upper_bound
from kvpolicy.contracts.components import KINDS, Component
from kvpolicy.loading import installed
from kvpolicy.loading.entries import POLICY_NAME, Catalog, Entry, held_kinds
from kvpolicy.ops import dispatch
from kvpolicy.spec import former, forms
from kvpolicy.spec.model import PolicySpec
from kvpolicy.spec.reference import ComponentRef

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

_Schema = dict[str, Any]


def json_schema() -> _Schema:
    """Return the JSON schema of a policy file, for editors and other tools."""
    catalog = installed.catalog()
    definitions: _Schema = {}
    # A file with `extends` may say only what differs, so component fields exist in a complete and a partial form.
    kinds = dict.fromkeys(
        (*forms.REFERENCES, "post", *(k for e in catalog.entries() for k in held_kinds(e.component).values()))
    )
    for kind in kinds:
        definitions[kind] = _reference(kind, catalog, definitions)
        overlays = [_overlay(entry, definitions) for entry in catalog.entries(kind)]
        definitions[f"{kind}.changes"] = {"type": "object", "not": {"required": ["use"]}, "anyOf": overlays}
    properties = {field: _described(field, schema) for field, schema in _fields(catalog, definitions).items()}
    for former_name, present in former.FIELDS.items():
        properties[former_name] = {**properties[present], "description": f"Now `{present}`.", "deprecated": True}
    properties["extends"] = {
        "type": "string",
        "minLength": 1,
        "description": "A policy to start from: its name, or the path of its file relative to this one.",
    }
    for kind in forms.REFERENCES:
        properties[kind] |= {"anyOf": [{"$ref": f"#/$defs/{kind}"}, {"$ref": f"#/$defs/{kind}.changes"}]}
    required = ["schema_version", "policy", "budget", "trigger", "importance"]
    standing_alone = {
        "required": required,
        "properties": {kind: {"$ref": f"#/$defs/{kind}"} for kind in forms.REFERENCES},
    }
    return {
        "$schema": DIALECT,
        "title": "kvpolicy policy",
        "type": "object",
        "additionalProperties": False,
        "required": ["schema_version", "policy"],
        "properties": properties,
        "if": {"required": ["extends"]},
        "else": standing_alone,
        "$defs": definitions,
    }


def _fields(catalog: Catalog, definitions: _Schema) -> _Schema:
    """Return the schema of every field; the component fields are filled in later."""
    plain: _Schema = {
        "schema_version": {"const": 1},
        "policy": {"type": "string", "pattern": f"^{POLICY_NAME.pattern}$"},
        "description": {"type": "string"},
        "paper": {"type": "string"},
        "departures": {"type": "array", "items": {"type": "string"}},
        "budget": _budget(),
        "phase": {"enum": ["prefill", "decode", "both"], "default": "decode"},
        "prefill_chunk": {
            "anyOf": [{"type": "integer", "minimum": 1, "maximum": LONGEST_TEXT}, {"type": "null"}],
            "default": None,
        },
        "backend": {"enum": dispatch.backend_names(), "default": "auto"},
        "protect": _protect(catalog, definitions),
        "post": {"type": "array", "items": {"$ref": "#/$defs/post"}, "default": []},
    }
    return {field: plain.get(field, {}) for field in forms.FIELDS}


def _described(field: str, schema: _Schema) -> _Schema:
    return {**schema, "description": descriptions(PolicySpec)[field]}


def _budget() -> _Schema:
    fields = Budget.model_json_schema()["properties"]
    tokens = {"type": "integer", "minimum": 1, "maximum": LONGEST_TEXT, "description": fields["tokens"]["description"]}
    fraction = {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "description": fields["fraction"]["description"]}
    either = [
        {"type": "object", "additionalProperties": False, "required": [name], "properties": {name: schema}}
        for name, schema in (("tokens", tokens), ("fraction", fraction))
    ]
    return {"anyOf": [*either, tokens, fraction]}


def _reference(kind: str, catalog: Catalog, definitions: _Schema) -> _Schema:
    """Return the schema of a reference to a component of one kind: its name, `use:` with parameters, or a shorthand."""
    forms_of_all: list[_Schema] = []
    entries = catalog.entries(kind)
    for entry in entries:
        parameters = _parameters(entry, definitions)
        described = {"title": entry.name, "description": _summary(entry.component)}
        forms_of_all.append({**described, **_with_use(entry.name, described["description"], parameters)})
        if not parameters.get("required"):
            forms_of_all.append({**described, "const": entry.name})
        if kind == "trigger":
            forms_of_all.append(
                {
                    **described,
                    "type": "object",
                    "additionalProperties": False,
                    "required": [entry.name],
                    "properties": {
                        entry.name: {
                            **_setting(entry, parameters, switch=[True]),
                            "description": described["description"],
                        }
                    },
                }
            )
    return {"anyOf": forms_of_all} if forms_of_all else {"not": {}}


def _with_use(name: str, description: str, parameters: _Schema) -> _Schema:
    return {
        **parameters,
        "required": ["use", *parameters.get("required", [])],
        "properties": {"use": {"const": name, "description": description}, **parameters["properties"]},
    }


def _overlay(entry: Entry, definitions: _Schema) -> _Schema:
    """Return the schema of some of a component's parameters, as a file with `extends` names them without `use:`."""
    schema = _parameters(entry, definitions)
    held = {
        name: {
            **schema["properties"][name],
            "anyOf": [*schema["properties"][name]["anyOf"], {"$ref": f"#/$defs/{kind}.changes"}],
        }
        for name, kind in held_kinds(entry.component).items()
    }
    rest = {key: value for key, value in schema.items() if key != "required"}
    return {**rest, "properties": {**schema["properties"], **held}}


def _setting(entry: Entry, parameters: _Schema, switch: list[bool]) -> _Schema:
    """Return the schema of what stands after a component's name: a switch, the shorthand's value or parameters."""
    options = [{"enum": switch}, parameters]
    if entry.component.shorthand is not None:
        options.append(parameters["properties"][entry.component.shorthand])
    return {"anyOf": options}


def _protect(catalog: Catalog, definitions: _Schema) -> _Schema:
    properties = {}
    for entry in catalog.entries("protection"):
        setting = _setting(entry, _parameters(entry, definitions), switch=[True, False])
        properties[entry.name] = {**setting, "description": _summary(entry.component)}
    return {"type": "object", "additionalProperties": False, "properties": properties, "default": {}}


def _parameters(entry: Entry, definitions: _Schema) -> _Schema:
    """Return the object schema of a component's parameters; the definitions in it move to the top under its name."""
    prefix = f"{entry.kind}.{entry.name}"
    held = held_kinds(entry.component)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PydanticJsonSchemaWarning)  # a component as a default, which is written below
        schema = entry.component.model_json_schema(ref_template=f"#/$defs/{prefix}.{{model}}")
    bases = {KINDS[kind].__name__ for kind in held.values()}
    for name, definition in schema.pop("$defs", {}).items():
        if name not in bases:
            definitions[f"{prefix}.{name}"] = definition
    properties = schema.get("properties", {})
    for name, field in entry.component.model_fields.items():
        if field.annotation is int and not has_upper_bound(field):
            properties[name]["maximum"] = LONGEST_TEXT
    for former_name, present in entry.component.formerly.items():
        properties[former_name] = {**properties[present], "description": f"Now `{present}`.", "deprecated": True}
    for name, kind in held.items():
        properties[name] = _held(kind, entry.component.model_fields[name], descriptions(entry.component)[name])
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        **({"required": schema["required"]} if "required" in schema else {}),
    }


def _held(kind: str, field: FieldInfo, description: str) -> _Schema:
    """Return the schema of a parameter that is a component of a kind."""
    schema: _Schema = {"anyOf": [{"$ref": f"#/$defs/{kind}"}]}
    if NoneType in get_args(field.annotation):
        schema["anyOf"].append({"type": "null"})
    if description:
        schema["description"] = description
    if isinstance(field.default, Component):
        schema["default"] = ComponentRef(installed.catalog().name_of(type(field.default)), field.default).data
    elif not field.is_required():
        schema["default"] = field.default
    return schema


def _summary(component: type[Component]) -> str:
    """Return the first paragraph of a component's own docstring."""
    doc = inspect.cleandoc(component.__doc__ or "")
    return " ".join(doc.split("\n\n")[0].split())
