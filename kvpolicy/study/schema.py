"""The JSON schema of study files, and one for editors that serves files of both kinds."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from kvpolicy.loading.entries import POLICY_NAME
from kvpolicy.spec import json_schema
from kvpolicy.spec.schema import DIALECT
from kvpolicy.study.metrics import METRICS
from kvpolicy.study.sampling import Sampling
from kvpolicy.study.sources import SOURCES
from kvpolicy.study.spec import FIELDS, QUICK_FIELDS, StudySpec

_Schema = dict[str, Any]

_POLICY: Final = {"anyOf": [{"type": "string", "minLength": 1}, {"$ref": "#/$defs/inline_policy"}]}


def files_schema() -> _Schema:
    """Return the JSON schema (draft 2020-12) of policy and of study files: a study says ``kind: study``."""
    policy = json_schema()
    definitions = policy.pop("$defs")
    del policy["$schema"], policy["title"]
    # Within a study a policy needs neither a version nor a name.
    inline = {**policy, "required": []}
    inline["else"] = {**policy["else"], "required": ["budget", "trigger", "importance"]}
    definitions |= {"policy": policy, "inline_policy": inline, "study": _study()}
    return {
        "$schema": DIALECT,
        "title": "kvpolicy policy or study",
        "type": "object",
        "if": {"required": ["kind"]},
        "then": {"$ref": "#/$defs/study"},
        "else": {"$ref": "#/$defs/policy"},
        "$defs": definitions,
    }


def _study() -> _Schema:
    axes = {
        "type": "object",
        "properties": {"policy": {"type": "array", "minItems": 1, "items": _POLICY}},
        "additionalProperties": {"type": "array", "minItems": 1},
    }
    written: _Schema = {
        "schema_version": {"const": 1},
        "kind": {"const": "study"},
        "study": {"type": "string", "pattern": f"^{POLICY_NAME.pattern}$"},
        "base": {"anyOf": [*_POLICY["anyOf"], {"type": "null"}]},
        "axes": axes,
        "conditions": axes,
        "exclude": {"type": "array", "items": {"type": "object", "minProperties": 1}},
        "datasets": {"type": "array", "minItems": 1, "items": _datasets()},
        "sampling": Sampling.model_json_schema(),
        "metrics": {"type": "array", "uniqueItems": True, "items": {"enum": list(METRICS)}},
    }
    properties = {}
    for field in FIELDS:
        info = StudySpec.model_fields[field]
        properties[field] = {**(written.get(field) or _plain(info)), "description": info.description or ""}
    quick = {field: {k: v for k, v in properties[field].items() if k != "default"} for field in QUICK_FIELDS}
    properties["quick"] = {
        "anyOf": [{"type": "object", "additionalProperties": False, "properties": quick}, {"type": "null"}],
        "description": properties["quick"]["description"],
    }
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["schema_version", "kind", "study", "models", "datasets"],
        "properties": properties,
    }


def _plain(info: FieldInfo) -> _Schema:
    """Return the schema of a field that holds what a file says."""
    kind: Any = info.annotation
    for rule in info.metadata:
        kind = Annotated[kind, rule]
    schema: _Schema = TypeAdapter(kind).json_schema()
    return schema if info.is_required() else {**schema, "default": _listed(info.default)}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _datasets() -> _Schema:
    names = [name for name, kind in SOURCES.items() if not _required(kind)]
    forms = [
        {
            "type": "object",
            "additionalProperties": False,
            "required": ["use", *_required(kind)],
            "description": (kind.__doc__ or "").strip(),
            "properties": {"use": {"const": name}, **kind.model_json_schema()["properties"]},
        }
        for name, kind in SOURCES.items()
    ]
    return {"anyOf": [{"enum": names}, *forms]}


def _required(kind: type[BaseModel]) -> list[str]:
    return [name for name, info in kind.model_fields.items() if info.is_required()]
