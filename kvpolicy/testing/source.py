"""Prints cases, components and policies as Python: a failing example as a test that can be pasted into a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from textwrap import indent
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from kvpolicy.contracts.budget import Budget
from kvpolicy.contracts.components import Component, kind_of
from kvpolicy.errors import KVPolicyError
from kvpolicy.loading.installed import catalog
from kvpolicy.policy.policy import Policy
from kvpolicy.testing.tables import reads_tables


@dataclass
class _Writer:
    """Writes expressions and gathers what they must import."""

    imports: set[str]

    def expression(self, value: Any) -> str:  # noqa: PLR0911  # one for each type
        """Return Python that makes an equal value."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, torch.dtype):
            self.imports.add("import torch")
            return str(value)
        if isinstance(value, Component):
            return self._component(value)
        if isinstance(value, Budget):
            self._name(Budget)
            given = value.model_dump(exclude_none=True)
            return f"Budget({', '.join(f'{k}={v!r}' for k, v in given.items())})"
        if is_dataclass(value) and not isinstance(value, type):
            return self._fields(value)
        if isinstance(value, Mapping):
            return self._many("{", [f"{k!r}: {self.expression(v)}" for k, v in value.items()], "}")
        if isinstance(value, tuple):
            items = [self.expression(v) for v in value]
            return self._many("(", items, ",)" if len(items) == 1 and "\n" not in items[0] else ")")
        if isinstance(value, list):
            return self._many("[", [self.expression(v) for v in value], "]")
        if isinstance(value, float) and value not in (value, 0.0):  # NaN
            return "nan"
        return repr(value)

    def _many(self, left: str, items: list[str], right: str) -> str:
        flat = ", ".join(items)
        if len(flat) < 90 and "\n" not in flat:
            return f"{left}{flat}{right}"
        return left + "\n" + indent(",\n".join(items) + ",", "    ") + "\n" + right.lstrip(",")

    def _tensor(self, tensor: Tensor) -> str:
        self.imports |= {"import torch", "from torch import tensor"}
        numbers = repr(tensor.tolist())
        for word in ("nan", "inf"):
            if word in numbers:
                self.imports.add(f"from math import {word}")
        if tensor.numel() == 0:
            return f"torch.zeros({list(tensor.shape)}, dtype={tensor.dtype})"
        return f"tensor({numbers}, dtype={tensor.dtype})"

    def _name(self, cls: type[Any]) -> str:
        name = cls.__qualname__
        if "<locals>" in name or cls.__module__ == "__main__":
            return f"{cls.__name__}"  # defined inside a function or script: to be imported by hand
        self.imports.add(f"from {cls.__module__} import {name.split('.')[0]}")
        return name

    def _component(self, component: Component) -> str:
        cls = type(component)
        given = []
        for name, field in cls.model_fields.items():
            value = getattr(component, name)
            if field.is_required() or value != field.get_default(call_default_factory=True):
                given.append(f"{name}={self.expression(value)}")
        try:
            registered = catalog().name_of(cls)
        except KVPolicyError:
            return f"{self._name(cls)}({', '.join(given)})"
        self.imports.add("from kvpolicy import catalog")
        return f"catalog().get({kind_of(cls)!r}, {registered!r})({', '.join(given)})"

    def _fields(self, value: Any) -> str:
        items = []
        for field in fields(value):
            if not field.init:
                continue
            now = getattr(value, field.name)
            if isinstance(value, Policy) and field.name in ("paper", "departures", "description"):
                continue
            if field.default is not MISSING and _equal(now, field.default):
                continue
            if field.default_factory is not MISSING and isinstance(now, Mapping) and not now:
                continue
            items.append(f"{field.name}={self.expression(now)}")
        return self._many(f"{self._name(type(value))}(", items, ")")


def _equal(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else bool(a == b)


def expression(value: Any) -> str:
    """Return a Python expression for a case, a component, a policy, a tensor or plain values."""
    return _Writer(set()).expression(value)


def pasteable_test(law: str, text: str, subject: Component | Policy, drawn: Mapping[str, Any]) -> str:
    """Return the source of a test that checks one law on one example.

    Args:
        law: name of the law.
        text: what the law says, or what went wrong, for the docstring.
        subject: component or policy.
        drawn: keyword arguments of the law's statement.
    """
    writer = _Writer({"from kvpolicy.testing import LAWS"})
    lines = [f"{name} = {writer.expression(value)}" for name, value in drawn.items()]
    lines.insert(0, f"subject = {writer.expression(subject)}")
    arguments = "".join(f", {name}={name}" for name in drawn)
    lines.append(f"LAWS[{law!r}].holds(subject{arguments})")
    if reads_tables(subject):
        writer.imports.add("from kvpolicy.testing.tables import stand_in_tables")
        lines = ["with stand_in_tables():", *(indent(line, "    ") for line in lines)]
    body = "\n".join([f'"""{_one_line(text)}"""', *lines])
    head = "\n".join(_merged(writer.imports))
    return f"{head}\n\n\ndef test_{law}():\n{indent(body, '    ')}\n"


def _merged(imports: set[str]) -> list[str]:
    """Join `from x import a` and `from x import b`."""
    names: dict[str, list[str]] = {}
    for line in sorted(imports):
        module, _, name = line.removeprefix("from ").partition(" import ")
        names.setdefault(module, []).extend([name] if name else [])
    return [f"from {m} import {', '.join(n)}" if n else m for m, n in names.items()]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace('"""', "'''").rstrip('"')


def tensors_of(value: Any, name: str = "") -> list[str]:
    """Return readable lines for everything in a drawn example: tensors with name, dtype, shape and numbers."""
    if isinstance(value, Tensor):
        return [f"{name}: {str(value.dtype).removeprefix('torch.')} {list(value.shape)}", indent(_numbers(value), "  ")]
    if is_dataclass(value) and not isinstance(value, type):
        parts = [(f.name, getattr(value, f.name), f.default) for f in fields(value)]
        shown = [(n, v) for n, v, default in parts if default is MISSING or not _equal(v, default)]
        return [line for n, v in shown for line in tensors_of(v, f"{name}.{n}" if name else n)]
    if isinstance(value, Mapping):
        return [line for k, v in value.items() for line in tensors_of(v, f"{name}[{k!r}]")]
    if isinstance(value, tuple | list) and any(is_dataclass(v) or isinstance(v, Tensor | BaseModel) for v in value):
        return [line for i, v in enumerate(value) for line in tensors_of(v, f"{name}[{i}]")]
    return [f"{name}: {value!r}"]


def _numbers(tensor: Tensor) -> str:
    if tensor.numel() > 400:
        return str(tensor)
    if tensor.dim() <= 1:
        return repr(_rounded(tensor.tolist()))
    index = torch.cartesian_prod(*[torch.arange(n) for n in tensor.shape[:-1]]).reshape(-1, tensor.dim() - 1)
    return "\n".join(f"{i}: {_rounded(tensor[tuple(i)].tolist())}" for i in index.tolist())


def _rounded(numbers: Any) -> Any:
    if isinstance(numbers, list):
        return [_rounded(n) for n in numbers]
    return round(numbers, 6) if isinstance(numbers, float) else numbers
