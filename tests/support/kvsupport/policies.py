"""Registered policies at budgets that a small test can fill."""

from __future__ import annotations

from typing import Any

import kvpolicy
from kvpolicy import Policy, PolicySpec


def small_policy(name: str, budget: int = 24, interval: int = 8) -> Policy:
    """Return a registered policy at a small budget; what is larger than that is made to fit."""
    return small_spec(name, budget, interval).build()


def small_spec(name: str, budget: int = 24, interval: int = 8) -> PolicySpec:
    """Return the specification of that policy."""
    spec = kvpolicy.load(name)
    changes: dict[str, Any] = {} if spec.budget.fraction == 1.0 else {"budget": 0.4 if spec.budget.fraction else budget}
    data = spec.to_data()
    if data["trigger"]["use"] == "every":
        changes["trigger.interval"] = interval
    if data["protect"].get("recent", {}).get("count", 0) > budget // 2:
        changes["protect.recent"] = budget // 2
    if data["importance"].get("observe", 0) > budget // 2:
        changes["importance.observe"] = budget // 2
    if data["protect"].get("sinks", {}).get("count", 0) > budget // 4:
        changes["protect.sinks"] = budget // 4
    if data["protect"].get("large_values", {}).get("count", 0) > budget // 8:
        changes |= {"protect.large_values.count": budget // 8, "protect.large_values.newest": budget // 2}
    for size in ("lag", "chunk"):  # of partitions of the sequence
        if data["importance"].get(size, 0) > budget // 4:
            changes[f"importance.{size}"] = budget // 4
    if "sketch" in data["redundancy"].get("base", {}):  # fewer keys than columns have a leverage of nearly 1 each
        changes["redundancy.base.sketch"] = budget // 4
    if spec.prefill_chunk is not None:
        changes["prefill_chunk"] = interval
    if data["mixer"].get("size", 0) > budget // 6:  # blocks, and what takes no part in them
        changes |= {"mixer.sinks": budget // 4, "mixer.recent": budget // 2, "mixer.size": budget // 6}
    if data["selector"]["use"] == "representatives" or "mixer.size" in changes:
        changes["selector.size"] = budget // 6
    return spec.replace(changes) if changes else spec
