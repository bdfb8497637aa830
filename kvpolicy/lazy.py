"""Public names that are imported when they are used."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def attach(
    package: str, computed: Mapping[str, Callable[[], Any]] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package.

    The names stand in the package's ``if TYPE_CHECKING:`` block, as imports that editors and type checkers follow.

    Args:
        package: its `__name__`.
        computed: further names, and what makes their values.
    """
    module = sys.modules[package]
    homes, made = _homes(module), computed or {}
    public = sorted({*homes, *made})

    def getattribute(name: str) -> Any:
        if name in made:
            value = made[name]()
        elif name in homes:
            value = getattr(import_module(homes[name]), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(module, name, value)
        return value

    return getattribute, lambda: public, public


def _homes(module: ModuleType) -> dict[str, str]:
    """Return the names that a module imports for type checkers, and where from."""
    assert module.__spec__ is not None
    loader: Any = module.__spec__.loader
    source = loader.get_data(module.__spec__.origin)  # pytest's loader of plugins has no get_source
    blocks = (node for node in ast.parse(source).body if isinstance(node, ast.If))
    imports = (node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom))
    return {alias.name: node.module or "" for node in imports for alias in node.names}
