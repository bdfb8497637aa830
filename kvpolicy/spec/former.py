"""Former names: what a field or a parameter was called in an earlier version is read on, with one warning per file."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from kvpolicy.contracts.components import KINDS
from kvpolicy.errors import FormerNameWarning
from kvpolicy.loading.entries import Catalog, held_kinds
from kvpolicy.spec.problems import FieldError, dotted
from kvpolicy.spec.yaml_text import KeyPath, Mark

FIELDS: Final[dict[str, str]] = {}
"""Former name of a field of policy files -> its present one. Parameters of components say so in `formerly`."""

Marks = dict[KeyPath, Mark]
_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class Former(NamedTuple):
    """A former name that was met: where, and what is written now."""

    path: KeyPath
    present: str


def present_fields(data: Mapping[str, Any], marks: Marks, met: list[Former]) -> dict[str, Any]:
    """Return a mapping of fields under their present names.

    Args:
        data: fields, as they are written.
        marks: where they stand; changed in place.
        met: takes the former names.

    Raises:
        FieldError: a field is given under both names.
    """
    return _renamed(data, FIELDS, (), marks, met)


def present_parameters(
    data: Mapping[str, Any], beneath: Mapping[str, Any], catalog: Catalog, marks: Marks, met: list[Former]
) -> dict[str, Any]:
    """Return a canonical mapping whose components have their parameters under their present names.

    Args:
        data: the mapping.
        beneath: the one that it will be laid over, which says of what component the parameters are.
        catalog: knows the names.
        marks: where values stand; changed in place.
        met: takes the former names.

    Raises:
        FieldError: a parameter is given under both names.
    """
    result = dict(data)
    for field, value in data.items():
        if field == "protect":
            result[field] = {
                name: _present("protection", name, given, _NOTHING, (field, name), catalog, marks, met)
                for name, given in value.items()
            }
        elif field == "post":
            result[field] = [
                _present("post", None, item, _NOTHING, (field, i), catalog, marks, met) for i, item in enumerate(value)
            ]
        else:
            old = beneath.get(field, _NOTHING)
            result[field] = _present(field, None, value, old, (field,), catalog, marks, met)
    return result


def _present(
    kind: str, use: Any, value: Any, beneath: Any, path: KeyPath, catalog: Catalog, marks: Marks, met: list[Former]
) -> Any:
    """Return one reference, and those of the components that it holds, under present names."""
    if not isinstance(value, Mapping) or kind not in KINDS:  # a field of no component is for what reads it to refuse
        return value
    beneath = beneath if isinstance(beneath, Mapping) else _NOTHING
    use = value.get("use", beneath.get("use")) if use is None else use
    if not isinstance(use, str) or use not in catalog.names(kind):
        return value
    component = catalog.get(kind, use)
    result = _renamed(value, component.formerly, path, marks, met)
    for name, inner in held_kinds(component).items():
        if name in result:
            old = beneath.get(name, _NOTHING)
            result[name] = _present(inner, None, result[name], old, (*path, name), catalog, marks, met)
    return result


def _renamed(
    data: Mapping[str, Any], names: Mapping[str, str], path: KeyPath, marks: Marks, met: list[Former]
) -> dict[str, Any]:
    result = {}
    for key, value in data.items():
        present = names.get(key, key)
        if present != key:
            if present in data:
                raise FieldError((*path, key), f"is the former name of `{present}`, which is given, too; remove it.")
            met.append(Former((*path, key), present))
            old = (*path, key)
            for each in [each for each in marks if each[: len(old)] == old]:
                marks[*path, present, *each[len(old) :]] = marks[each]
        result[present] = value
    return result


def warn_of(met: Iterable[Former], source: str, marks: Mapping[KeyPath, Mark] = MappingProxyType({})) -> None:
    """Warn once of all former names that one file, or one call, has used.

    Args:
        met: the former names.
        source: what the file is called; "" for a call.
        marks: where they stand.
    """
    if not (names := list(met)):
        return
    path, present = names[0]
    place = str(marks[path]) if path in marks else source
    more = f" ({len(names) - 1} more former name{'s' if len(names) > 2 else ''} behind this one)" if names[1:] else ""
    warnings.warn(
        f"{place}{': ' if place else ''}{dotted(path)}: is called `{present}` now, and the former name will be refused "
        f"from the next major version on; write `{present}`{more}.",
        FormerNameWarning,
        stacklevel=2,
    )
