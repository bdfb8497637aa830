"""Versions and machine of a run, for the record."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from kvpolicy.study.executors import cores

_PACKAGES: Final = ("kvpolicy", "torch", "transformers", "datasets", "math-verify", "scipy", "ray")


def environment() -> dict[str, str | None]:
    """Return versions, processor, and accelerator if there is one; what cannot be said is None."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": processor(),
        "accelerator": _accelerator(),
        **{name: _version(name) for name in _PACKAGES},
    }


def processor() -> str:
    """Return the name of the processor and how many of its cores this process may use."""
    name = ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        pass
    name = " ".join((name or platform.processor()).split())[:200]
    count = cores()
    return f"{name or 'unknown'}, {count} core{'' if count == 1 else 's'}"


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
