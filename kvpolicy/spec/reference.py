"""A reference to a component: the name it is registered under and its validated parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import ValidationError

from kvpolicy._catalog import Catalog
from kvpolicy.components import Component
from kvpolicy.errors import UnknownComponentError, did_you_mean
from kvpolicy.spec.problems import FieldError, from_pydantic
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
        """All parameters as plain values, defaults included; a new dictionary."""
        values = self.component.model_dump()
        return {name: plain(value, (name,)) for name, value in values.items()}

    @property
    def data(self) -> dict[str, Any]:
        """The reference as it is written in a file: ``{use: name, parameter: value}``."""
        return {"use": self.use, **self.params}

    def __str__(self) -> str:
        return f"{self.use}({', '.join(f'{k}={v!r}' for k, v in self.params.items())})"


def resolve(kind: str, data: Mapping[str, Any], path: KeyPath, catalog: Catalog) -> ComponentRef:
    """Find the component and validate its parameters; raises FieldError.

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
    try:
        found = catalog.get(kind, name)
    except UnknownComponentError as error:
        raise FieldError(path, str(error), UnknownComponentError) from None
    try:
        # JSON mode is as strict about types, but takes a list for a tuple, which Python mode refuses.
        return ComponentRef(name, found.model_validate_json(json.dumps(params)))
    except ValidationError as error:
        raise from_pydantic(error, path, params, repr(name), found.model_fields) from None


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
