"""A reference to a component: the name it is registered under and its validated parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import NoneType
from typing import Annotated, Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from kvpolicy.contracts.components import Component
from kvpolicy.errors import UnknownComponentError, did_you_mean
from kvpolicy.loading import installed
from kvpolicy.loading.entries import Catalog, held_kinds
from kvpolicy.spec.problems import FieldError, Problems, from_pydantic, shown
from kvpolicy.spec.yaml_text import KeyPath


@dataclass(frozen=True)
class ComponentRef:
    """Names a registered component and holds it with its parameters; comparable and hashable as the component is.

    Attributes:
        use: the registered name.
        component: the component that the name and the parameters stand for.
    """

    use: str
    component: Component

    @property
    def params(self) -> dict[str, Any]:
        """All parameters as plain values, defaults included, a component as its reference; a new dictionary."""
        held = self.held
        values = self.component.model_dump(exclude=set(held))
        return {
            name: held[name].data if name in held else plain(values.get(name), (name,))
            for name in type(self.component).model_fields
        }

    @property
    def held(self) -> dict[str, ComponentRef]:
        """The components that parameters hold; raises UnknownComponentError when one is not registered."""
        held = {name: getattr(self.component, name) for name in held_kinds(type(self.component))}
        catalog = installed.catalog()
        return {name: ComponentRef(catalog.name_of(type(c)), c) for name, c in held.items() if c is not None}

    @property
    def data(self) -> dict[str, Any]:
        """The reference as it is written in a file: ``{use: name, parameter: value}``."""
        return {"use": self.use, **self.params}

    def __str__(self) -> str:
        shown_as = {name: repr(value) for name, value in self.params.items()}
        shown_as |= {name: str(ref) for name, ref in self.held.items()}
        return f"{self.use}({', '.join(f'{k}={v}' for k, v in shown_as.items())})"


def resolve(kind: str, data: Mapping[str, Any], path: KeyPath, catalog: Catalog) -> ComponentRef:
    """Find the component and validate its parameters, those that are components included; raises FieldError.

    Args:
        kind: kind of component.
        data: canonical ``{use: name, parameter: value}``.
        path: where the reference stands.
        catalog: knows the names.
    """
    if "use" not in data:
        names = catalog.names(kind)
        near = next(filter(None, (did_you_mean(key, names) for key in data)), "")
        raise FieldError(
            path, f"does not say which component.{near} Write {{use: name, ...}} with one of {', '.join(names)}."
        )
    name, params = data["use"], {key: value for key, value in data.items() if key != "use"}
    if not isinstance(name, str):
        raise FieldError((*path, "use"), f"should be the name of a component, got {shown(name)}.")
    try:
        found = catalog.get(kind, name)
    except UnknownComponentError as error:
        raise FieldError(path, str(error), UnknownComponentError) from None
    kinds = held_kinds(found)
    held: dict[str, Component] = {}
    problems = Problems()
    for field, inner in kinds.items():
        info = found.model_fields[field]
        with problems:
            if params.get(field) is not None or (field in params and NoneType not in get_args(info.annotation)):
                held[field] = _held(inner, params.pop(field), (*path, field), catalog)
            elif field not in params and info.is_required():
                known = ", ".join(catalog.names(inner))
                raise FieldError(
                    (*path, field), f"is required; write the name of a component of kind {inner}: {known}."
                )
    wrong = {problem.path[: len(path) + 1] for problem in problems.found}
    component = None
    try:
        # JSON mode is as strict about types, but takes a list for a tuple, which Python mode refuses.
        if not held:
            component = found.model_validate_json(json.dumps(params))
        else:
            component = found.model_validate({**_pythonic(found, params, path), **held})
    except ValidationError as error:
        more = from_pydantic(error, path, params, repr(name), found.model_fields)
        problems.found += (problem for problem in more if problem.path[: len(path) + 1] not in wrong)
    problems.check()
    assert component is not None
    return ComponentRef(name, component)


def unfolded(kind: str, data: Mapping[str, Any], catalog: Catalog) -> dict[str, Any]:
    """Write every held component of a canonical reference as ``{use: name, ...}``, as far as names are known."""
    use = data.get("use")
    if not isinstance(use, str) or use not in catalog.names(kind):
        return dict(data)
    result = dict(data)
    for field, inner in held_kinds(catalog.get(kind, use)).items():
        value = result.get(field)
        if isinstance(value, str):
            value = {"use": value}
        if isinstance(value, Mapping):
            result[field] = unfolded(inner, value, catalog)
    return result


def _held(kind: str, value: Any, path: KeyPath, catalog: Catalog) -> Component:
    if isinstance(value, str):
        value = {"use": value}
    if not isinstance(value, Mapping):
        raise FieldError(path, f"should be the name of a component or {{use: name, ...}}, got {shown(value)}.")
    return resolve(kind, value, path, catalog).component


def _pythonic(component: type[Component], params: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
    """Turn lists into the tuples that Python mode wants; raises FieldError."""
    result = dict(params)
    for name, field in component.model_fields.items():
        if isinstance(result.get(name), list | dict):
            kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            adapter: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(strict=True))
            try:
                result[name] = adapter.validate_json(json.dumps(result[name]))
            except ValidationError as error:
                raise from_pydantic(error, (*path, name), result[name], repr(name), ()) from None
    return result


def plain(value: Any, path: KeyPath) -> Any:
    """Return a value in the types that YAML and JSON have; raises FieldError for others."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return value
    for basic in (int, float, str):  # subclasses, such as NumPy's float64, become what they stand for
        if isinstance(value, basic):
            return basic(value)
    if isinstance(value, Mapping):
        return {_key(key, path): plain(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted(plain(item, path) for item in value)
    raise FieldError(
        path, f"a {type(value).__name__} cannot be written in a policy file; give a number, text, list or mapping."
    )


def _key(key: Any, path: KeyPath) -> str:
    if not isinstance(key, str):
        raise FieldError(path, f"the key {key!r} is not text; use text keys.")
    return key
