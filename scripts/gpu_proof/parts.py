"""The parts of the proof: what each shows, how long it may take, and the command that runs it."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bare import ROOT


@dataclass(frozen=True)
class Setting:
    """What commands depend on.

    Attributes:
        python: the interpreter.
        out: folder of the results; each benchmark writes `out/NAME.json`.
        dry: toy sizes on the CPU.
        workers: processes for tests, 1 without pytest-xdist.
        model: why SmolLM2 is not there, or None.
    """

    python: str
    out: Path
    dry: bool
    workers: int = 1
    model: str | None = None

    def figures(self, name: str) -> Path:
        """Return the file in which a part leaves its figures."""
        return self.out / "logs" / f"{name}.json"


Command = Callable[[Setting, float], list[str]]
"""Takes the setting and the seconds that the part has."""


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: of its files, too.
        shows: what is known when it has passed.
        seconds: its limit on a GPU.
        command: what runs.
        tests: whether it is judged by tests that passed, or by its exit status alone.
        dry_environment: environment variables of a dry run.
        skip: says why it cannot run here, or None.
    """

    name: str
    shows: str
    seconds: float
    command: Command
    tests: bool = False
    dry_environment: Mapping[str, str] = field(default_factory=dict)
    skip: Callable[[Setting], str | None] = lambda _: None


def pytest(setting: Setting, *which: str) -> list[str]:
    """Return pytest without the checkout's pins: warnings of other versions are no errors, absent plugins no need."""
    spread = ["-n", str(setting.workers), "--dist", "worksteal"] if setting.workers > 1 else []
    mark = [] if setting.dry else ["-m", "gpu"]
    return [
        setting.python, "-P", "-m", "pytest", "-v", "-rN", "--tb=short", "--color=no", "-p", "no:cacheprovider",
        "-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=default", *spread, *mark, *which,
    ]  # fmt: skip


def benchmark(script: str, name: str, *full: str, quick: tuple[str, ...] = ()) -> Command:
    """Return the command of a benchmark that is told when to stop, some seconds before its limit."""

    def command(setting: Setting, seconds: float) -> list[str]:
        sizes = ("--quick", *quick) if setting.dry else (*full, "--until", f"{time.time() + seconds - 5:.0f}")
        figures = str(setting.figures(name))
        return [setting.python, "-P", str(ROOT / "benchmarks" / script), *sizes, "--json", figures]

    return command


def sanitizer() -> str | None:
    """Return the path of compute-sanitizer."""
    for folder in (None, os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        found = shutil.which("compute-sanitizer", path=folder and str(Path(folder) / "bin"))
        if found is not None:
            return found
    return None


def racecheck(setting: Setting, _seconds: float) -> list[str]:
    """Return compactions under the sanitizer; a dry run has no device to look at and runs some of it without."""
    some = "test_layers_in_one_launch_and_keeping_everything"
    if not setting.dry:
        some += " or test_an_engine_compacts_with_the_kernels"
    tests = pytest(
        Setting(setting.python, setting.out, setting.dry), "-k", some,
        "tests/kernels/test_selection.py", "tests/kernels/test_policies.py",
    )  # fmt: skip
    tool = sanitizer()
    if setting.dry or tool is None:
        return tests
    return [tool, "--tool", "racecheck", "--target-processes", "all", "--error-exitcode", "86", *tests]


_INTERPRETED = {"TRITON_INTERPRET": "1"}
_WITH_KERNELS = {"TRITON_INTERPRET": "1", "KVPOLICY_BACKEND": "triton"}
# Of the tests of kernels, those that a dry run takes: the others run in the interpreter as `make test-kernels`.
_SOME_KERNELS = "(test_layouts and 32) or (test_compaction_moves_bits and forward)"

PARTS = (
    Part(
        "kernels",
        "every kernel against float64: all head dims, dtypes and strides, poisoned outputs, repeated bit for bit; a "
        "compaction captured as a CUDA graph",
        120,
        lambda setting, _: pytest(setting, *(["-k", _SOME_KERNELS] if setting.dry else []), "tests/kernels"),
        tests=True,
        dry_environment=_INTERPRETED,
    ),
    Part(
        "decode-llama-3.1-8b",
        "tokens per second, peak bytes and the share of compactions, of whole caches and of policies that keep 1,024",
        110,
        benchmark("gpu_decode.py", "decode-llama-3.1-8b", "--shape", "llama-3.1-8b", quick=("--shape", "toy-llama")),
        dry_environment=_WITH_KERNELS,
    ),
    Part(
        "kernel-speed",
        "µs, GB/s and TFLOP/s of each kernel beside a copy, a matrix product, the literal form and `torch.compile`",
        45,
        benchmark("kernels.py", "kernel-speed"),
        dry_environment=_INTERPRETED,
    ),
    Part(
        "graph",
        "a decode step as one graph and captured as a CUDA graph, with compactions between steps, beside eager steps",
        60,
        benchmark(
            "graph.py", "graph", "--device", "cuda", "--shape", "llama-3.1-8b", "--layers", "4", "--budget", "1024",
            "--tokens", "160", "--rounds", "2",
            quick=("--compiler", "eager"),
        ),
    ),
    Part(
        "smollm2",
        "SmolLM2 in fp32 and bf16: the text of the full cache below the budget, of the plain policy as one graph, and "
        "what the kernels keep beside what torch keeps",
        55,
        lambda setting, _: pytest(
            Setting(setting.python, setting.out, setting.dry), "tests/runtimes/hf/test_smollm2_on_a_device.py"
        ),
        tests=True,
        dry_environment={"KVPOLICY_DEVICE": "cpu"},
        skip=lambda setting: setting.model,
    ),
    Part(
        "decode-qwen2-1.5b",
        "the same of a smaller model, where a step is many small launches",
        35,
        benchmark(
            "gpu_decode.py", "decode-qwen2-1.5b", "--shape", "qwen2-1.5b",
            quick=("--shape", "toy-qwen2"),
        ),
    ),
    Part(
        "racecheck",
        "compactions under `compute-sanitizer --tool racecheck`",
        30,
        racecheck,
        tests=True,
        dry_environment=_INTERPRETED,
        skip=lambda setting: None
        if setting.dry or sanitizer()
        else "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin; it comes with the CUDA toolkit.",
    ),
)  # fmt: skip


def counted(log: str) -> dict[str, object]:
    """Count the tests in what pytest printed, also where it was cut off."""
    alone = re.findall(r"^(tests/.*?::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", log, re.MULTILINE)
    spread = re.findall(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) (tests/.*?) *$", log, re.MULTILINE)
    outcomes = [(outcome, test) for test, outcome in alone] + spread
    failures = [test for outcome, test in outcomes if outcome in ("FAILED", "ERROR")]
    return {
        "passed": sum(outcome == "PASSED" for outcome, _ in outcomes),
        "failed": len(failures),
        "skipped": sum(outcome == "SKIPPED" for outcome, _ in outcomes),
        "failures": failures[:20],
    }
