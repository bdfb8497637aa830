"""The hooks by which a package brings components, policies and calibration tables, bundled ones included.

A plugin is a module named by an entry point of the group ``kvpolicy``:

    [project.entry-points.kvpolicy]
    my-plugin = "my_package.plugin"
"""

from __future__ import annotations

import os
from typing import Any, Final, Protocol

import pluggy

PROJECT: Final = "kvpolicy"
"""Name of the pluggy project and of the entry-point group."""

PLUGIN_API_VERSION: Final = 1
"""What a plugin module may declare as ``kvpolicy_api``; another number is refused when the plugin is loaded."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class RegisterComponent(Protocol):
    """Takes the name of a component and its class; the kind follows from the base class."""

    def __call__(self, name: str, component: type[Any], /) -> None:  # noqa: D102
        ...


class RegisterPolicy(Protocol):
    """Takes the name of a policy or study and its file (a path) or its YAML text (a string with a line break)."""

    def __call__(self, name: str, path_or_text: str | os.PathLike[str], /) -> None:  # noqa: D102
        ...


class RegisterTable(Protocol):
    """Takes the name of a calibration table, ``model/method``, and its file."""

    def __call__(self, name: str, path: str | os.PathLike[str], /) -> None:  # noqa: D102
        ...


class RegisterBackend(Protocol):
    """Takes the name of a backend and an instance of `kvpolicy.ops.Backend`."""

    def __call__(self, name: str, backend: Any, /) -> None:  # noqa: D102
        ...


@hookspec
def kvpolicy_register_components(register: RegisterComponent) -> None:
    """Call `register(name, component_class)` for every component that the plugin brings."""


@hookspec
def kvpolicy_register_policies(register: RegisterPolicy) -> None:
    """Call `register(name, path_or_text)` for every policy that the plugin brings."""


@hookspec
def kvpolicy_register_tables(register: RegisterTable) -> None:
    """Call `register(name, path)` for every calibration table that the plugin brings."""


@hookspec
def kvpolicy_register_studies(register: RegisterPolicy) -> None:
    """Call `register(name, path_or_text)` for every study that the plugin brings."""


@hookspec
def kvpolicy_register_backends(register: RegisterBackend) -> None:
    """Call `register(name, backend)` for every backend of `kvpolicy.ops` that the plugin brings."""
