"""Benchmarks by name: each with its published fields, prompts, grading and lengths of answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from kvpolicy.study.benchmarks import mathematics
from kvpolicy.study.benchmarks.choices import GpqaDiamondSource, LongBench2Source
from kvpolicy.study.benchmarks.infinitebench import InfiniteBenchSource
from kvpolicy.study.benchmarks.longbench import LongBenchSource
from kvpolicy.study.benchmarks.loogle import LooGleSource
from kvpolicy.study.benchmarks.ruler import RulerSource
from kvpolicy.study.source import Source

BENCHMARKS: Final[Mapping[str, type[Source]]] = {
    "math-500": mathematics.Math500Source,
    "gsm8k": mathematics.Gsm8kSource,
    "aime-2024": mathematics.Aime2024Source,
    "aime-2025": mathematics.Aime2025Source,
    "aime-2026": mathematics.Aime2026Source,
    "hmmt-2025": mathematics.Hmmt2025Source,
    "gpqa-diamond": GpqaDiamondSource,
    "ruler": RulerSource,
    "longbench": LongBenchSource,
    "longbench-v2": LongBench2Source,
    "infinitebench": InfiniteBenchSource,
    "loogle": LooGleSource,
}
"""The values of `use` that name a benchmark."""
