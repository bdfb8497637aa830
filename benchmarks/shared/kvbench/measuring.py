"""Clocks, interleaving, spread, memory, and the form in which every benchmark reports."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is used for sums; its own log lines are in the way

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

MIB = 1 << 20
GIB = 1 << 30
Step = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """One timed run, in seconds.

    Attributes:
        wall: what a clock on the wall says; other programs on the machine are in it.
        cpu: what the processor spent on this program: on its one thread if torch has one, else on all of its threads.
    """

    wall: float
    cpu: float


def cpu_clock() -> str:
    """Say which processor time `timed` measures; tables print it."""
    return "CPU time of the one thread" if torch.get_num_threads() == 1 else "CPU time of all threads"


def timed(run: Step) -> Sample:
    """Run once."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.process_time
    wall, cpu = time.perf_counter(), clock()
    run()
    return Sample(time.perf_counter() - wall, clock() - cpu)


def interleaved(steps: Mapping[str, Step], rounds: int) -> dict[str, list[Sample]]:
    """Time every step once per round, in turn and back again, after one run of each that does not count."""
    for step in steps.values():
        step()
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    for number in range(rounds):
        names = list(steps) if number % 2 else list(steps)[::-1]
        for name in names:
            samples[name].append(timed(steps[name]))
    return samples


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some numbers."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Summarise one number or more."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high, len(values))

    @property
    def width(self) -> float:
        """Distance of the quartiles."""
        return self.high - self.low

    def text(self, form: str = ".2f", factor: float = 1.0) -> str:
        """Write `median [low, high]`, each times `factor`."""
        low, median, high = (format(factor * x, form) for x in (self.low, self.median, self.high))
        return f"{median} [{low}, {high}]"


def peak_extra(run: Step) -> int:
    """Return the most bytes that tensors allocated inside `run` hold at a time.

    Raises:
        SystemExit: this version of torch records no allocations.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    recorder: Any = profile.profiler
    events = [event for event in recorder.kineto_results.events() if event.name() == "[memory]"]
    if not events:
        raise SystemExit(
            "torch's profiler recorded no allocation, so memory cannot be measured; use torch 2.6 or newer."
        )
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return int(most)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to a file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, says nothing about speed")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    return parser


def machine() -> dict[str, object]:
    """Say what was measured on: processor, threads and versions."""
    processor = platform.processor()
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        names = [
            line.split(":", 1)[1].strip() for line in listed.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "kvpolicy")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> None:
    """Print a table; `note` says below it how to read it."""
    table = Table(*columns, title=title, title_justify="left", caption=escape(note) or None, caption_justify="left")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    Console(width=140).print(table)


def write(options: argparse.Namespace, benchmark: str, figures: Mapping[str, object]) -> None:
    """Write the figures to `--json`, with what they were measured on; dataclasses become objects."""
    if options.json is None:
        return
    asked = {name: value for name, value in vars(options).items() if name != "json"}
    report = {
        "benchmark": benchmark,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in asked.items()},
        "machine": machine(),
        "cpu_clock": cpu_clock(),
        **figures,
    }
    # Some write after every line: what is read meanwhile, or after a kill, is whole.
    partial = options.json.with_name(f".{options.json.name}.partial")
    partial.write_text(json.dumps(report, indent=1, default=asdict) + "\n", encoding="utf-8")
    partial.replace(options.json)
