"""How often the budget that `kvpolicy study budget` names keeps its promise: on problems that it was not chosen by.

A pool of recorded runs is cut at random, again and again, into problems that the budget is chosen by and fresh ones;
what is lost on the fresh ones is then compared with the bound. The pool stands for the workload, so the loss on all
of it is what the promise is about.

    kvpolicy study run benchmarks/study_budget.yaml --out pool.sqlite
    python -P benchmarks/study_budget.py pool.sqlite --loss 0.02 0.05
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvpolicy.study.asked import Asked
from kvpolicy.study.certify import needed, passing
from kvpolicy.study.published import SUFFIX, Published
from kvpolicy.study.results import Results
from kvpolicy.study.sufficient import LostMetric, losses_of

ByBudget = Mapping[str, Mapping[int, float]]


def main() -> None:
    """Print a table: a row for each policy and bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a results file, or a published one")
    parser.add_argument("--loss", type=float, nargs="+", default=[0.02], help="bounds")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--share", type=float, default=0.5, help="share of the pool that the budget is chosen by")
    parser.add_argument("--repeats", type=int, default=100)
    arguments = parser.parse_args()
    lost = _losses(arguments.file)
    print(
        "| dataset | policy | bound, points | chosen by | none is chosen | budgets that were chosen | "
        "within the bound, fresh problems | within the bound, whole pool |\n|---|---|---|---|---|---|---|---|"
    )
    for (_, dataset, policy, condition), line in lost.lines.items():
        problems = sorted(next(iter(line.values())))
        count = round(arguments.share * len(problems))
        for bound in arguments.loss:
            name = f"{policy} ({condition})" if condition else policy
            if count < needed(bound, 1 - arguments.confidence, binary=lost.binary):
                print(f"| {dataset} | `{name}` | {100 * bound:g} | {count} | refused: too few problems | | | |")
                continue
            drawn = random.Random(0)  # noqa: S311 - which problems are drawn is no secret
            samples = [set(drawn.sample(problems, count)) for _ in range(arguments.repeats)]
            row = _row(lost, line, samples, bound, 1 - arguments.confidence)
            print(f"| {dataset} | `{name}` | {100 * bound:g} | {count} | {row} |")


def _losses(file: Path) -> LostMetric:
    if file.name.endswith(SUFFIX):
        read = Published(file)
        return losses_of(read, Asked.last(read))
    with Results(file) as results:
        return losses_of(results, Asked.last(results))


def _row(lost: LostMetric, line: ByBudget, samples: Sequence[set[int]], bound: float, level: float) -> str:
    chosen: Counter[str] = Counter()
    fresh = pool = 0
    for sample in samples:
        seen = [[loss for problem, loss in losses.items() if problem in sample] for losses in line.values()]
        good = passing(seen, bound, level, binary=lost.binary)
        if not good:
            continue
        label = list(line)[good - 1]
        losses = line[label]
        others = [loss for problem, loss in losses.items() if problem not in sample]
        chosen[label] += 1
        fresh += sum(others) / len(others) <= bound
        pool += sum(losses.values()) / len(losses) <= bound
    some = sum(chosen.values())
    named = ", ".join(f"{label}: {chosen[label]}" for label in line if chosen[label])
    # Naming no budget breaks no promise.
    return f"{len(samples) - some} of {len(samples)} | {named or '-'} | {_of(fresh, some)} | {_of(pool, some)}"


def _of(number: int, some: int) -> str:
    return f"{number} of {some}" if some else "-"


if __name__ == "__main__":
    main()
