"""Write the tables of docs/kernels.md: which operations of each policy have a kernel, and what compiled kernels need.

python -P scripts/kernel_table.py [POLICY ...]

Each policy of `POLICIES` takes a text through a tiny model; each operation that asks for a backend is noted with its
options and asked again, with the head dim, group, soft-cap and sinks of each family, whether it has a kernel. The other
table shows some rows of tests/aot/resources.json.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpolicy.errors import KVPolicyError
from kvpolicy.ops import dispatch
from kvpolicy.ops.ragged import Blocks
from kvpolicy.testing.tables import stand_in_tables
from kvpolicy_kernels import served
from kvpolicy_kernels.aot import TARGETS
from kvpolicy_kernels.backend import TritonBackend

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
FIRST, LAST = "<!-- made by scripts/kernel_table.py -->\n", "<!-- end -->\n"
SECOND = "<!-- made by scripts/kernel_table.py from tests/aot/resources.json -->\n"
COMPILED = ROOT / "tests" / "aot" / "resources.json"
POOLED = "TILE=64 GROUP=4 QUERIES=16 BY_HEAD=0 MEAN=0 OVER_ROW=0 NORMS=1 LOGITS=1"
SHOWN = {
    "`scan_keys`, 4 heads × 8 queries, with norms": f"scan.scan_keys bf16 D=128 {POOLED}",
    "`scan_keys`, head dim 256": f"scan.scan_keys bf16 D=64 PARTS=4 {POOLED}",
    "`mean_weights`, softmax per head (SnapKV)": "window.mean_weights bf16 D=128 TILE=64 GROUP=4 QUERIES=16 "
    "BY_HEAD=1 MEAN=1 OVER_ROW=1",
    "`exempt`, beta 1": "similarity.exempt bf16 D=128 TILE=64 BETA=1 OWN=0 INDEX_ZERO=0",
    "`exempt`, beta 3": "similarity.exempt bf16 D=128 TILE=64 BETA=3 OWN=0 INDEX_ZERO=0",
    "`finish_redundancy`": "similarity.finish_redundancy fp32 BLOCK=1024 LOST=1 SOFTMAX=1",
    "`sum_near`, fp32 keys": "density.sum_near fp32 D=16 PARTS=8 TILE=64 ORDERED=1",
    "`select_top`, up to 1,024 slots": "selection.select_top fp32 BLOCK=1024 RESIDENT=1",
    "`select_top`, up to 4,096 slots": "selection.select_top fp32 BLOCK=4096 RESIDENT=1",
    "`select_top`, longer": "selection.select_top fp32 BLOCK=1024 RESIDENT=0",
    "`move_kept`, keys": "compaction.move_kept i64 WIDTH=32 PADDED=32 ROWS=1 BATCH=8",
    "`attend_part`, 1 query": "ragged.attend_part bf16 D=128 HELD=128 DV=128 HELD_V=128 ROWS=16 TILE=64 MASKED=0",
    "`attend_part`, head dim 256": "ragged.attend_part bf16 D=256 HELD=256 DV=256 HELD_V=256 ROWS=16 TILE=32 MASKED=0",
    "`combine_parts`": "ragged.combine_parts bf16 DV=128 HELD_V=128 ROWS=16 SINKS=0",
}
"""Names of launches without what they leave at 0 and without `warps` and `stages`."""


class Family(NamedTuple):
    """What of a model family matters to a kernel."""

    name: str
    dim: int
    group: int
    softcap: float | None = None
    sinks: bool = False


FAMILIES = (
    Family("Llama 3, Qwen3, Mistral", 128, 4),
    Family("Qwen2.5", 128, 7),
    Family("Phi-3", 96, 1),
    Family("Gemma 2", 256, 2, softcap=50.0),
    Family("Gemma 3, Qwen3-Next", 256, 8),
    Family("GPT-OSS", 64, 8, sinks=True),
)
POLICIES = ("rkv", "rkv-code", "rkv-paper", "rkv-density", "snapkv", "snapkv-prefill", "g-kv", "keydiff", "knorm")
"""Those that have kernels on purpose; any other's row is printed when it is named."""
Calls = dict[str, dict[str, Any]]


@contextmanager
def noting(calls: Calls) -> Iterator[None]:
    """Note the operations that ask for a backend, and let torch run them."""
    backend = TritonBackend()

    def note(_: str, op: str, args: Any, kwargs: dict[str, Any]) -> None:
        if backend.load(op) is None:
            calls.setdefault(op, {"none": True})
            return
        options = {k: v for k, v in kwargs.items() if isinstance(v, int | float | str)}
        observed = {"observed": args[0].shape[3]} if op == "window_importance" else {}
        calls.setdefault(f"{op} {sorted(options.items())}", {"op": op, **observed, "options": options})

    own = dispatch._implementation, dispatch.requested  # noqa: SLF001
    dispatch._implementation = note  # noqa: SLF001
    # An operation asks without a name; who chooses a backend for a cache gives one.
    dispatch.requested = lambda backend=None: "noted" if backend is None else own[1](backend)
    try:
        yield
    finally:
        dispatch._implementation, dispatch.requested = own  # noqa: SLF001


def calls_of(name: str) -> Calls:
    """Return the operations that a policy asks a backend for, with their options."""
    spec = importlib.util.spec_from_file_location("kept_sets_of_policies", ROOT / "scripts" / "kept_sets.py")
    assert spec is not None
    assert spec.loader is not None
    kept_sets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kept_sets)
    calls: Calls = {}
    with stand_in_tables():
        policy = replace(kept_sets.small(name), backend="torch")
        with noting(calls):
            kept_sets.run(policy, *kept_sets.subject(tiny=True))
    return calls


def reason(call: dict[str, Any], family: Family) -> str | None:
    """Say why a call has no kernel on a family, or None."""
    if "none" in call:
        return "no kernel"
    op, options = call["op"], dict(call["options"])
    keys = torch.empty(1, 1, 1, family.dim, dtype=torch.bfloat16)
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    check = getattr(served, op)
    if op == "window_importance":
        queries = torch.empty(1, 1, family.group, call["observed"], family.dim, dtype=torch.bfloat16)
        sinks = torch.empty(1, family.group) if family.sinks else None
        given = options | {"softcap": family.softcap, "attention_sinks": sinks}
        return _said(check(queries, None, None, keys, None, mask, **given))
    if op == "ragged_attention":
        kept = torch.empty(1, 16, family.dim, dtype=torch.bfloat16)
        given = options | {"softcap": family.softcap}
        return _said(check(keys, Blocks(kept, kept, torch.zeros(1), torch.zeros(1)), keys, keys, None, **given))
    if op == "compact":
        return _said(check(keys, None))
    if op == "top_k":
        return None
    if op == "key_density":
        keys = keys.float()
    return _said(check(keys, mask, **options))


def _said(answer: str | Tensor | None) -> str | None:
    return None if answer is None else str(answer).split(";")[0].removeprefix("there is no kernel for ")


def row(name: str) -> str:
    """Return a policy's row of the table."""
    try:
        calls = calls_of(name)
    except KVPolicyError as error:  # a policy that the tiny model cannot serve
        return f"| `{name}` | not run: {str(error).replace('|', '/')}{' |' * (1 + len(FAMILIES))}"
    ops = sorted({call.get("op", key) for key, call in calls.items()})
    cells = []
    for family in FAMILIES:
        missing = sorted(
            {
                f"{call.get('op', key)}: {why}"
                for key, call in calls.items()
                if (why := reason(call, family)) is not None
            }
        )
        cells.append(("not " + "; not ".join(missing) if missing else "all") if ops else "-")
    return f"| `{name}` | {', '.join(f'`{op}`' for op in ops) or '-'} | {' | '.join(cells)} |"


def table(names: list[str]) -> str:
    """Return the table."""
    head = "| policy | operations | " + " | ".join(
        f"{f.name} (D {f.dim}, G {f.group}{', soft-cap' * bool(f.softcap)}{', sinks' * f.sinks})" for f in FAMILIES
    )
    rule = "|---" * (2 + len(FAMILIES)) + "|"
    return "\n".join([head + " |", rule, *map(row, names)]) + "\n"


def resources() -> str:
    """Return the table of what compiled kernels need."""
    rows = json.loads(COMPILED.read_text(encoding="utf-8"))
    lines = [f"| kernel | warps | {' | '.join(TARGETS)} |", "|---" * (2 + len(TARGETS)) + "|"]
    for label, start in SHOWN.items():
        (name,) = [name for name in rows if name.startswith(f"{start} warps=")]
        cells = [f"{rows[name][target]['registers']} / {rows[name][target]['shared'] / 1024:.0f}" for target in TARGETS]
        lines.append(f"| {label} | {name.split('warps=')[1].split()[0]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def replaced(text: str, first: str, made: str) -> str:
    """Return a page with what lies between a mark and the next end replaced."""
    before, _, rest = text.partition(first)
    return before + first + made + LAST + rest.partition(LAST)[2]


def main(names: list[str]) -> int:
    """Write the tables; with names, print their rows only."""
    torch.set_num_threads(1)
    if names:
        print(table(names))
        return 0
    text = replaced(PAGE.read_text(encoding="utf-8"), FIRST, table(list(POLICIES)))
    PAGE.write_text(replaced(text, SECOND, resources()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
