"""Writes kvpolicy/spec/overrides.py: what `kvpolicy.load` can change of the bundled components, for editors.

python -P scripts/overrides.py
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import kvpolicy
from kvpolicy.contracts.components import Component
from kvpolicy.loading.entries import BUNDLED
from kvpolicy.spec import forms

PAGE = Path(__file__).resolve().parents[1] / "kvpolicy" / "spec" / "overrides.py"
_PLAIN = {int: "int", float: "float", bool: "bool", str: "str"}
_HEAD = '''"""Names of the overrides of `kvpolicy.load` for the bundled components, so that editors complete them.

Made by scripts/overrides.py. Any other override is passed on and checked in the same way: those of a plugin's
components are not listed here.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict


class KnownOverrides(TypedDict, total=False):
    """A field of a policy, or a parameter as ``field__parameter``."""

    phase: Literal["prefill", "decode", "both"]
    prefill_chunk: int | None
    backend: str
    budget__tokens: int
    budget__fraction: float
'''


def written() -> str:
    """Return the module."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    catalog = kvpolicy.catalog()
    for field in forms.REFERENCES:
        found[field].add("Any")
        found[f"{field}__use"].add("str")
        for entry in catalog.entries(field):
            if entry.origin.distribution == BUNDLED:
                for name, kind in _parameters(entry.component).items():
                    found[f"{field}__{name}"].add(kind)
    for entry in catalog.entries("protection"):
        if entry.origin.distribution == BUNDLED:
            found[f"protect__{entry.name}"].add("Any")
            for name, kind in _parameters(entry.component).items():
                found[f"protect__{entry.name}__{name}"].add(kind)
    lines = (f"    {name}: {_together(kinds)}" for name, kinds in found.items())
    return _HEAD + "\n".join(lines) + "\n"


def _parameters(component: type[Component]) -> dict[str, str]:
    return {name: _type(info.annotation) for name, info in component.model_fields.items()}


def _type(annotation: Any) -> str:
    return _PLAIN.get(annotation, "Any")


def _together(kinds: set[str]) -> str:
    return "Any" if "Any" in kinds else " | ".join(sorted(kinds))


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
