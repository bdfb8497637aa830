"""The bundled policies, one YAML file each, named as the file."""

from __future__ import annotations

from pathlib import Path

from kvpolicy.hookspecs import RegisterPolicy, hookimpl


@hookimpl
def kvpolicy_register_policies(register: RegisterPolicy) -> None:
    """Register every file of the folder ``policies``."""
    for path in sorted((Path(__file__).parent / "policies").glob("*.yaml")):
        register(path.stem, path)
