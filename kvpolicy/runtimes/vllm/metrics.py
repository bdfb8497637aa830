"""Numbers of workers at vLLM's `/metrics`: each worker writes its own into a small file, and the server reads them.

vLLM's server, scheduler and workers are processes of their own, and the server starts the others, so that a folder
whose name stands in the environment is known to all. Nothing is made before a worker with a policy has something to
say. Workers on other machines are not seen.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import struct
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from kvpolicy.runtimes.vllm import words
from kvpolicy.runtimes.vllm.session import Session

VARIABLE: Final = "KVPOLICY_VLLM_METRICS"
"""Environment variable: the folder; made up unless it is set."""

_NUMBERS: Final = struct.Struct("<4d")
_SAID: Final = (
    ("kvpolicy_evicted_entries", "Entries evicted per KV head and layer, over all requests.", "counter"),
    ("kvpolicy_compactions", "Compactions of requests.", "counter"),
    ("kvpolicy_compaction_seconds", "Seconds spent in compactions.", "counter"),
    ("kvpolicy_resident_blocks", "Blocks of the KV cache that requests hold.", "gauge"),
)


class MetricsWriter:
    """Writes a worker's numbers.

    Args:
        name: of the worker, among those of one server.
    """

    def __init__(self, name: str) -> None:
        where = Path(os.environ[VARIABLE])
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = (where / name).open("wb", buffering=0)
        weakref.finalize(self, self._file.close)

    def write(self, session: Session) -> None:
        """Write the numbers of now; a reader sees them whole."""
        counts = session.counts
        self._file.seek(0)
        self._file.write(
            _NUMBERS.pack(counts.evicted, counts.compactions, counts.seconds, session.cache.store.tables.held)
        )


class Collector:
    """What Prometheus asks in the server's process."""

    def collect(self) -> Iterator[Any]:
        """Yield the sums over all workers; nothing where no worker has a policy."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        where = folder()
        found = [] if where is None else [each.read_bytes() for each in sorted(where.glob("worker-*"))]
        rows = [_NUMBERS.unpack(each) for each in found if len(each) == _NUMBERS.size]
        if not rows:
            return
        for (name, said, kind), values in zip(_SAID, zip(*rows, strict=True), strict=True):
            family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            yield family(name, said, value=sum(values))


def folder() -> Path | None:
    """Return the folder that all processes of a server know, if there is one."""
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


_collectors: list[Collector] = []  # one per process


def announce() -> None:
    """Let this process show the numbers, and tell those that it starts where to write them."""
    if _collectors:
        return
    from prometheus_client import REGISTRY

    if VARIABLE not in os.environ:
        made = Path(tempfile.gettempdir(), f"kvpolicy-vllm-{secrets.token_hex(8)}")
        os.environ[VARIABLE] = str(made)
        atexit.register(_end, made, os.getpid())
    _collectors.append(Collector())
    REGISTRY.register(_collectors[0])


def _end(made: Path, maker: int) -> None:
    if os.getpid() == maker:  # not a process that was forked off
        words.repeat_refusal(made)
        shutil.rmtree(made, ignore_errors=True)
