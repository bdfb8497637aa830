"""What this package brings to kvpolicy; the entry point in pyproject.toml names this module."""

from __future__ import annotations

from pathlib import Path

from kvpolicy import hookimpl
from kvpolicy.loading.hookspecs import RegisterComponent, RegisterPolicy

kvpolicy_api = 1  # the plugin API that this is written for


@hookimpl
def kvpolicy_register_components(register: RegisterComponent) -> None:
    """Register components: the names stand in policy files after `use:`."""
    from example_plugin.allocator import ExamplePluginSlope
    from example_plugin.scorer import ExamplePluginSize

    register("example_plugin_size", ExamplePluginSize)
    register("example_plugin_slope", ExamplePluginSlope)


@hookimpl
def kvpolicy_register_policies(register: RegisterPolicy) -> None:
    """Register every file of the folder policies under its own name."""
    for path in sorted((Path(__file__).parent / "policies").glob("*.yaml")):
        register(path.stem, path)
