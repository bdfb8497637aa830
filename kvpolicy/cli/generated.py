"""The table after `kvpolicy generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Generation:
    """One generation.

    Attributes:
        policy: name of the policy.
        new_tokens: tokens generated.
        seconds: wall time, prompt included.
        stats: `CacheStats` of the cache at the end.
    """

    policy: str
    new_tokens: int
    seconds: float
    stats: Any


_ROWS: list[tuple[str, Callable[[Generation], float], Callable[[float], str]]] = [
    ("new tokens", lambda r: r.new_tokens, lambda v: f"{v:,.0f}"),
    ("seconds", lambda r: r.seconds, lambda v: f"{v:,.1f}"),
    ("tokens/s", lambda r: r.new_tokens / r.seconds if r.seconds else 0.0, lambda v: f"{v:,.1f}"),
    ("tokens seen", lambda r: r.stats.seen, lambda v: f"{v:,.0f}"),
    ("KV entries per head, resident", lambda r: r.stats.resident, lambda v: f"{v:,.0f}"),
    ("KV entries per head, peak", lambda r: r.stats.peak_resident, lambda v: f"{v:,.0f}"),
    ("KV entries per head, evicted", lambda r: r.stats.evicted, lambda v: f"{v:,.0f}"),
    ("KV bytes resident", lambda r: r.stats.bytes_resident, lambda v: f"{v / 2**20:,.2f} MiB"),
    ("KV bytes peak", lambda r: r.stats.bytes_peak, lambda v: f"{v / 2**20:,.2f} MiB"),
    ("KV bytes allocated", lambda r: r.stats.bytes_allocated, lambda v: f"{v / 2**20:,.2f} MiB"),
    ("compactions", lambda r: r.stats.compactions, lambda v: f"{v:,.0f}"),
]


def table(runs: Sequence[Generation]) -> Table:
    """Return a table with a column per run and, for two runs, the ratio of the first to the second."""
    result = Table(header_style="bold")
    result.add_column("")
    for run in runs:
        result.add_column(run.policy, justify="right")
    compared = len(runs) == 2
    if compared:
        result.add_column(f"{runs[0].policy} / {runs[1].policy}", justify="right")
    for name, value, written in _ROWS:
        values = [value(run) for run in runs]
        cells = [written(v) for v in values]
        if compared:
            cells.append(f"{values[0] / values[1]:.2f}" if values[1] else "")
        result.add_row(name, *cells)
    return result
