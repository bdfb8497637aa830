"""The tables of the proof: at the end of a run, and in docs/gpu.md, which this script writes.

From docs/results/gpu.json, or it says "not measured": `python -P scripts/gpu_proof/page.py`. With the gpu_proof.json of
a run on a GPU as its argument it keeps that there first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from parts import PARTS, ROOT

PAGE = ROOT / "docs" / "gpu.md"
KEPT = ROOT / "docs" / "results" / "gpu.json"
FIRST, LAST = "<!-- made by scripts/gpu_proof/page.py -->\n", "<!-- end -->\n"
NONE = "Not measured.\n"
Report = Mapping[str, Any]


def closing(report: Report) -> str:
    """Return what a run prints at its end: figures, and the table of the parts with their sum below it."""
    outcomes = [part["outcome"] for part in report["parts"]]
    passed, skipped = outcomes.count("passed"), outcomes.count("skipped")
    rows = [[p["name"], p["outcome"], f"{p['seconds']:.0f}", p["why"]] for p in report["parts"]]
    dry = ["A dry run: toy sizes on the CPU, not run on a GPU. Its figures say nothing about speed."] * report["dry"]
    total = f"parts: {passed} passed, {len(outcomes) - passed - skipped} failed, {skipped} skipped"
    notes = list(report["notes"])
    return "\n".join([figures(report), *notes, *dry, "", table(["part", "outcome", "s", ""], rows), total])


def block(report: Report | None) -> str:
    """Return the generated part of docs/gpu.md."""
    if report is None:
        head = "**Not measured.** The script has not been run on a GPU; every part has been run dry, on the CPU.\n"
    else:
        on = report["machine"]
        versions = ", ".join(f"{name} {on[name]}" for name in ("torch", "triton", "transformers", "python"))
        head = f"{on['device']}, {versions}, CUDA {on['cuda']}; {report['begun']}, {report['seconds']:.0f} s in all.\n"
    rows = []
    for part in PARTS:
        ended = of(report, part.name)
        last = "not measured" if ended is None else f"{ended['outcome']}, {ended['seconds']:.0f} s; {ended['why']}"
        rows.append([f"`{part.name}`", part.shows, f"{part.seconds:.0f}", last])
    parts = table(["part", "what it shows", "limit, s", "last run"], rows)
    return f"{head}\n{parts}\n{figures(report)}"


def figures(report: Report | None) -> str:
    """Return the tables of all benchmarks."""
    made = []
    for part in PARTS:
        if part.tests or (report is not None and of(report, part.name) is None):
            continue
        ended = of(report, part.name)
        rows = ((ended or {}).get("figures") or {}).get("rows") or []
        made.append(f"### {part.name}\n\n{_of_kind(part.name, rows) if rows else NONE}")
    return "\n".join(made)


def of(report: Report | None, name: str) -> Report | None:
    """Return how a part of a report ended, or None."""
    return next((part for part in (report or {}).get("parts", []) if part["name"] == name), None)


def _of_kind(name: str, rows: Sequence[Report]) -> str:
    if name == "graph":
        lines = [[r["lane"], r["batch"], _spread(r["step_ms"]) or r["outcome"]] for r in rows]
        return table(["cache", "batch", "ms a step"], lines)
    if name == "kernel-speed":
        lines = [
            [r["operation"], r["form"], r["keys"], _spread(r["microseconds"], ".1f") or r["outcome"],
             _number(r["gigabytes_per_second"], ".0f"), _number(r["of_copy"], ".0%"),
             _number(r["teraflops"], ".1f"), _number(r["of_matrix"], ".0%")]
            for r in rows
        ]  # fmt: skip
        head = ["operation", "form", "keys", "µs", "GB/s", "of a copy", "TFLOP/s", "of a matrix product"]
        return table(head, lines)
    lines = [
        [r["cache"], r["context"], r["batch"], _number(r["tokens_per_second"], ".1f") or r["outcome"],
         _spread(r["step_ms"]), _number(r["compaction_share"], ".1%"), _number(r["peak_bytes"], ".1f", 1e9)]
        for r in rows
    ]  # fmt: skip
    return table(["cache", "tokens before", "rows", "tokens/s", "ms a step", "compaction", "GB at most"], lines)


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else format(value / unit, form)


def _spread(value: Report | None, form: str = ".2f") -> str:
    return "" if value is None else "{} [{}, {}]".format(*(format(value[k], form) for k in ("median", "low", "high")))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |\n" for line in lines)


def kept() -> Report | None:
    """Return the report that the page is made from."""
    if not KEPT.is_file():
        return None
    found: Report = json.loads(KEPT.read_text(encoding="utf-8"))
    return found


def text() -> str:
    """Return the page as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(FIRST)
    return before + FIRST + "\n" + block(kept()) + "\n" + LAST + rest.partition(LAST)[2]


def main(files: list[str]) -> int:
    """Write the page."""
    if files:
        given = Path(files[0])
        try:
            report = json.loads(given.read_text(encoding="utf-8"))
            dry = report["dry"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{given} is no gpu_proof.json: {error!r}", file=sys.stderr)
            return 2
        if dry:
            print(f"{given} is of a dry run, which measures nothing; give that of a run on a GPU.", file=sys.stderr)
            return 2
        KEPT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
