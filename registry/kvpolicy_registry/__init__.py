"""The bundled policies and studies, one YAML file each, and calibration tables, named model/method."""

from __future__ import annotations

from pathlib import Path

from kvpolicy.loading.hookspecs import RegisterPolicy, RegisterTable, hookimpl

_HERE = Path(__file__).parent


@hookimpl
def kvpolicy_register_policies(register: RegisterPolicy) -> None:
    """Register every file of the folder ``policies``."""
    for path in sorted((_HERE / "policies").glob("*.yaml")):
        register(path.stem, path)


@hookimpl
def kvpolicy_register_studies(register: RegisterPolicy) -> None:
    """Register every file of the folder ``studies``."""
    for path in sorted((_HERE / "studies").glob("*.yaml")):
        register(path.stem, path)


@hookimpl
def kvpolicy_register_tables(register: RegisterTable) -> None:
    """Register every file of the folder ``tables``."""
    for path in sorted((_HERE / "tables").glob("*/*.safetensors")):
        register(f"{path.parent.name}/{path.stem}", path)
