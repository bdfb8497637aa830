"""Policies in a few words, for headings."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import kvpolicy

if TYPE_CHECKING:
    from kvpolicy.spec import PolicySpec


def details(spec: PolicySpec) -> str:
    """Return when a policy evicts and what it protects: ``every 128 tokens · protects sinks 4, recent 8``."""
    if spec.budget.fraction == 1:
        return ""
    data = spec.to_data()
    when = "once, when the prompt ends" if spec.phase == "prefill" else _when(data["trigger"])
    protected = ", ".join(_named(name, values) for name, values in (data.get("protect") or {}).items())
    return f"{when} · protects {protected or 'nothing'}"


def _when(trigger: Mapping[str, Any]) -> str:
    if trigger.get("use") == "each_step":
        return "at every token"
    if trigger.get("use") == "every":
        return f"every {trigger['interval']} tokens"
    return _named(str(trigger.get("use")), {name: value for name, value in trigger.items() if name != "use"})


def _named(name: str, values: Mapping[str, Any]) -> str:
    """Return a part and its parameters; one that is alone needs no name."""
    if len(values) == 1:
        return f"{name} {next(iter(values.values()))}"
    return f"{name} ({', '.join(f'{key} {value}' for key, value in values.items())})" if values else name


def made(dtype: str) -> str:
    """Return in which dtype, by which version and on which day a trace is made."""
    return f"{dtype} · kvpolicy {kvpolicy.__version__} · {datetime.now(UTC).date().isoformat()}"
