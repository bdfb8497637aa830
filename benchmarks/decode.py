"""Decode speed of a policy against the full cache and against the fastest cache of its size, side by side.

Three caches decode the same text in turn, 16 tokens each, in one process: transformers' DynamicCache (the full cache),
the policy, and a preallocated cache that always holds budget + interval/2 entries and decides nothing, which is as
fast as a cache of that size can be. With ``--kvpress`` another interpreter runs kvpress's DecodingPress at the same
sizes, afterwards and alone.

    python -P benchmarks/decode.py --quick
    python -P benchmarks/decode.py --batch 1 8 32 --tokens 4096 8192 --every 1024 --full-tokens 16 --json decode.json
    python -P benchmarks/decode.py --tokens 2048 --share 2 --every 256      # below the budget: nothing is evicted
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

_HERE = Path(__file__).resolve().parent  # not itself on the path: kernels.py would pass for the PyPI package
sys.path[:] = [str(_HERE / "shared"), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

from kvbench import lanes as racing
from kvbench import measuring, real
from kvbench.elsewhere import kvpress_side
from kvbench.lanes import Lane
from kvbench.measuring import Spread
from kvpolicy.runtimes.hf import PolicyCache

FULL, FIXED = "DynamicCache", "preallocated"


@dataclass(frozen=True)
class Case:
    """One run: rows, tokens to decode, entries that the policy keeps, and tokens between two compactions."""

    batch: int
    tokens: int
    budget: int
    interval: int

    @property
    def evicts(self) -> bool:
        """Whether the text is longer than what the policy holds."""
        return self.full_from < racing.PROMPT + self.tokens

    @property
    def full_from(self) -> int:
        """Position from which on the policy's cache is full and compacted again and again."""
        return self.budget + self.interval

    @property
    def fixed_entries(self) -> int:
        """Entries of a cache between two compactions, on average."""
        return self.budget + self.interval // 2

    def bytes_needed(self, model: PreTrainedModel) -> int:
        """Estimate what a run needs: the caches, one layer of the full one twice (it is copied), and the model."""
        length, layers = racing.PROMPT + self.tokens, len(DynamicCache(config=model.config).layers)
        held = (
            length + 2 * length / layers + min(self.full_from, 2 * length) + (self.fixed_entries if self.evicts else 0)
        )
        weights: int = sum(p.numel() * p.element_size() for p in model.parameters())
        return int(self.batch * held * racing.entry_bytes(model)) + weights


@torch.no_grad()
def run(model: PreTrainedModel, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Decode one case in all lanes; return its figures."""
    every, block = options.every or case.interval, case.interval
    copies = case.batch if options.every else 1
    rows = 1 if options.every else case.batch
    tokens = racing.rows_of_text(racing.PROMPT + case.tokens, rows, model)
    with ExitStack() as stack:
        cache = stack.enter_context(
            PolicyCache(racing.policy_with(options.policy, case.budget, options.interval), model)
        )
        lanes = [
            Lane(FULL, model, DynamicCache(config=model.config), copies),
            Lane(options.policy, model, cache, copies),
        ]
        if case.evicts:
            lanes.append(racing.PreallocatedLane(FIXED, model, case.fixed_entries, copies))
        for lane in lanes:
            lane.prefill(tokens[:, : racing.PROMPT])
        few = {FULL: options.full_tokens} if options.full_tokens else {}
        blocks = sampled_blocks(tokens.shape[1], block, every, case.full_from)
        at = racing.PROMPT
        for start, stop in blocks:
            for lane in lanes:
                lane.feed(tokens[:, at:start])
            racing.decode_block(lanes, tokens, start, stop, few)
            at = stop
        peak_resident = cache.stats().peak_resident
    return figures(case, lanes, blocks) | {"peak_resident": peak_resident}


def sampled_blocks(length: int, block: int, every: int, full_from: int) -> list[tuple[int, int]]:
    """Return (start, stop) of the blocks to decode.

    They are the first tokens, those from which on the policy's cache is full, and the last of every `every` tokens.
    """
    starts = list(range(racing.PROMPT + every - block, length, every))
    last = max(racing.PROMPT, length - block)
    if every > block:
        starts += [racing.PROMPT, min(full_from, last), last]
    blocks: list[tuple[int, int]] = []
    for start in sorted(set(starts)):
        if not blocks or start >= blocks[-1][1]:
            blocks.append((start, min(start + block, length)))
    return blocks


def whole_run(lane: Lane, blocks: list[tuple[int, int]], clock: str, stop: int) -> float:
    """Return the seconds of all tokens of a run: a block's mean at its middle, linear in between.

    Blocks lie at the start and at the end of equal pieces of the text, so their plain mean would favour late tokens.
    """
    points = []
    for start, end in blocks:
        seconds = [getattr(t, clock) for t in lane.between(start, end)]
        points.append((start + len(seconds) / 2, _mean(seconds)))
    return racing.integrated(points, racing.PROMPT, stop)


def figures(case: Case, lanes: list[Lane], blocks: list[tuple[int, int]]) -> dict[str, Any]:
    """Turn the times of single tokens into what the tables and the file say."""
    means = {
        lane.name: {
            clock: [_mean([getattr(t, clock) for t in lane.between(*block)]) for block in blocks]
            for clock in ("wall", "cpu")
        }
        for lane in lanes
    }
    full, ours = lanes[0].name, lanes[1].name
    end = racing.PROMPT + case.tokens
    runs = {clock: {lane.name: whole_run(lane, blocks, clock, end) for lane in lanes} for clock in ("wall", "cpu")}
    found: dict[str, Any] = {
        "batch": case.batch,
        "tokens": case.tokens,
        "budget": case.budget,
        "interval": case.interval,
        "blocks": blocks,
        "seconds_per_token": means,
        "median_seconds_per_token": {
            lane.name: [Spread.of([t.wall for t in lane.between(*block)]) for block in blocks] for lane in lanes
        },
        "run_seconds": runs,
        "tokens_per_second": {lane.name: case.batch * case.tokens / runs["wall"][lane.name] for lane in lanes},
        "peak_bytes": {lane.name: lane.peak_bytes for lane in lanes},
        "speed_of_full": {
            lane.name: {clock: run[full] / run[lane.name] for clock, run in runs.items()} for lane in lanes[1:]
        },
    }
    if case.evicts:
        # Only blocks in which the policy's cache is as large as the other one.
        steady = [i for i, (start, _) in enumerate(blocks) if start >= case.full_from]
        if steady:
            found["share_of_preallocated"] = {
                clock: Spread.of([means[FIXED][clock][i] / means[ours][clock][i] for i in steady])
                for clock in ("wall", "cpu")
            }
            full_blocks = [blocks[i] for i in steady]
            for name, fixed in (("flat", None), ("flat_beside_preallocated", lanes[2])):
                found[name] = {clock: flatness(lanes[1], full_blocks, clock, fixed) for clock in ("wall", "cpu")}
    return found


def flatness(lane: Lane, blocks: list[tuple[int, int]], clock: str, fixed: Lane | None = None) -> dict[str, Any]:
    """Compare the first full block that reaches 1,024 tokens with the last one, against the spread inside of blocks.

    Args:
        lane: whose tokens.
        blocks: those in which its cache is full.
        clock: wall or cpu.
        fixed: divide by this lane's median of the same block, whose work never changes: what the machine does meanwhile
            is then left out. Without it, seconds.
    """
    late = [block for block in blocks if block[1] > 1024] or blocks
    unit = {
        block: 1.0 if fixed is None else Spread.of([getattr(t, clock) for t in fixed.between(*block)]).median
        for block in late
    }
    found = [Spread.of([getattr(t, clock) / unit[block] for t in lane.between(*block)]) for block in late]
    # Not the spread of all tokens: a cache that slows down would widen that too.
    spread = statistics.median(each.width for each in found)
    return {
        "at": [late[0][0], late[-1][0]],
        "medians": [found[0].median, found[-1].median],
        "spread": spread,
        "flat": abs(found[-1].median - found[0].median) < spread if len(late) > 1 else None,
    }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def beside_kvpress(model: PreTrainedModel, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Run kvpress's DecodingPress at the sizes of a case in its own interpreter."""
    answer = kvpress_side(
        options.kvpress,
        "decode",
        model=model.name_or_path,
        batch=case.batch,
        budget=case.budget,
        interval=case.interval,
        steps=min(2, case.tokens // case.interval) * case.interval,
    )
    answer["tokens_per_second"] = case.batch / _mean([wall for wall, _ in answer["seconds"]])
    return answer


def _verdicts(flat: dict[str, dict[str, Any]]) -> str:
    return " / ".join({True: "yes", False: "NO", None: "one block"}[each["flat"]] for each in flat.values())


def report(results: list[dict[str, Any]], policy: str) -> None:
    """Print the summary, and time per token against generated length."""
    rows = []
    for r in results:
        speed = r["tokens_per_second"]
        share = r.get("share_of_preallocated")
        press = r.get("kvpress")
        rows.append([
            r["batch"], r["tokens"], r["budget"],
            " / ".join(f"{speed[name]:.1f}" if name in speed else "-" for name in (FULL, policy, FIXED)),
            f"{press['tokens_per_second']:.1f}" if press else "-",
            ", ".join(f"{s['wall']:.2f}x / {s['cpu']:.2f}x" for s in r["speed_of_full"].values()),
            f"{share['wall'].text('.0%')} / {share['cpu'].text('.0%')}" if share else "-",
            ", ".join(_verdicts(r[name]) for name in ("flat", "flat_beside_preallocated")) if share else "-",
            f"{r['peak_bytes'][FULL] / measuring.MIB:.0f} / {r['peak_bytes'][policy] / measuring.MIB:.0f}",
        ])  # fmt: skip
    measuring.show(
        f"Decoding with {policy}",
        ["batch", "tokens", "budget", f"tokens/s full / {policy} / preallocated", "kvpress",
         f"speed of the full cache: {policy}, preallocated",
         "share of preallocated", "flat, beside preallocated", f"KV MiB full / {policy}"],
        rows,
        "Speeds are of the whole run, integrated over blocks. Tokens/s by wall clock. Pairs of ratios: by wall clock / "
        f"by {measuring.cpu_clock()}. In brackets: quartiles over blocks. kvpress ran afterwards in a process of its "
        "own, not interleaved.",
    )  # fmt: skip
    for r in results:
        names = list(r["median_seconds_per_token"])
        measuring.show(
            f"Milliseconds per token against generated length: batch {r['batch']}, {r['tokens']} tokens",
            ["generated", *names],
            [
                [stop - racing.PROMPT, *(r["median_seconds_per_token"][name][i].text(".2f", 1e3) for name in names)]
                for i, (_, stop) in enumerate(r["blocks"])
            ],
            "Median of the block's tokens by wall clock [quartiles]; a compaction falls on one of them.",
        )


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; `--quick` replaces the sizes."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--model", type=Path, help="folder of a model; SmolLM2-135M-Instruct by default")
    parser.add_argument("--policy", default="rkv")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="tokens to decode")
    parser.add_argument("--share", type=float, nargs="+", default=[0.1], help="budgets, as shares of prompt and tokens")
    parser.add_argument("--budget", type=int, help="a budget in entries, instead of --share")
    parser.add_argument("--interval", type=int, help="tokens between two compactions; the policy's own by default")
    parser.add_argument("--every", type=int, default=0, help="decode and time one interval in so many tokens")
    parser.add_argument(
        "--full-tokens", type=int, default=0, help="time only so many tokens of a block with DynamicCache"
    )
    parser.add_argument("--memory", type=float, default=16.0, help="GiB; what needs more is skipped")
    parser.add_argument("--kvpress", metavar="PYTHON", help="an interpreter that has kvpress and transformers < 5.3")
    options = parser.parse_args(argv)
    if options.quick:
        options.batch, options.tokens, options.budget, options.interval = [2], [48], 16, 8
        options.every, options.full_tokens = 16, 4
    return options


def main(argv: list[str] | None = None) -> None:
    """Run all cases, print tables, and write JSON when asked."""
    options = parsed(argv)
    torch.set_num_threads(options.threads)
    model = real.load_model(options.model)
    results, skipped = [], []
    for batch in options.batch:
        for tokens in options.tokens:
            lengths = [round(share * (racing.PROMPT + tokens)) for share in options.share]
            for budget in [options.budget] if options.budget else lengths:
                interval = racing.interval_of(racing.policy_with(options.policy, budget, options.interval))
                case = Case(batch, tokens, budget, interval)
                needed = case.bytes_needed(model) / measuring.GIB
                if needed > options.memory:
                    skipped.append(
                        f"Skipped batch {batch} at {tokens} tokens: it needs about {needed:.1f} GiB, more than the "
                        f"{options.memory:g} GiB of --memory."
                    )
                    print(skipped[-1])
                    continue
                result = run(model, case, options)
                if options.kvpress:
                    result["kvpress"] = beside_kvpress(model, case, options)
                results.append(result)
    if results:
        report(results, options.policy)
    measuring.write(options, "decode", {"results": results, "skipped": skipped})


if __name__ == "__main__":
    main()
