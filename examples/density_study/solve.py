"""Whether a reasoning model would still solve its problems under a policy: the right solution is read, not generated.

    python examples/density_study/solve.py --model reasoner --family prompt-recall --steps 5 --distractors 14

A greedy decoder writes the right solution word for word exactly if every next token is its best guess while the right
ones are read, with the same compactions between the same tokens; reading takes a tenth of the time. A wording that
differs but ends with the right answer counts as wrong here, so shares are at most those of `kvpolicy study run`.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.study.decoding import Prompts, forward
from kvpolicy.study.forcing import room
from kvpolicy.study.tasks import Size, SolvedProblem, draw

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reasoning_model"))
import evaluate


def problems(family: Any, steps: int, distractors: int, split: Any, count: int) -> list[SolvedProblem]:
    """Return problems of a size that no published level has."""
    size = Size(steps, distractors) if family == "prompt-recall" else Size(steps, asked=min(4, steps))
    return [
        draw(random.Random(f"{family}/{steps}/{distractors}/{split}/{i}"), family, size, split=split)  # noqa: S311
        for i in range(count)
    ]


def first_wrong(model: Any, tokenizer: Any, policy: Policy, chosen: Sequence[SolvedProblem]) -> list[int | None]:
    """Return the place in each solution where the best guess is wrong first; None where there is none."""
    encode = tokenizer.get_vocab()
    rows = [
        [encode["<bos>"], *(encode[w] for w in f"{p.prompt} {p.solution}".split()), encode["<eos>"]] for p in chosen
    ]
    starts = [len(p.prompt.split()) + 1 for p in chosen]
    wrong: list[int | None] = [None] * len(rows)
    longest = max(len(row) - start for row, start in zip(rows, starts, strict=True))
    with torch.inference_mode(), PolicyCache(policy, model) as cache:
        prompts = Prompts([row[:start] for row, start in zip(rows, starts, strict=True)], model.device)
        mask, read = prompts.mask, 0  # tokens of the solution that went in
        best = prompts.run(model, cache).argmax(-1)[:, None]
        while True:
            # `best` are the guesses for the tokens from `read - best.shape[1] + 1` on.
            first = read - best.shape[1] + 1
            for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
                for place, token in enumerate(row[start + first : start + read + 1]):
                    if wrong[i] is None and int(best[i, place]) != token:
                        wrong[i] = first + place
            count = min(room(cache), longest - read - 1)
            if count <= 0 or all(place is not None for place in wrong):
                return wrong
            part = [row[start + read : start + read + count] for row, start in zip(rows, starts, strict=True)]
            ids = torch.tensor([one + [0] * (count - len(one)) for one in part])
            positions = torch.tensor([start + read for start in starts])[:, None] + torch.arange(count)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(rows), count)], 1)
            cache.expect("verify")
            best = forward(model, cache, ids, positions, mask, logits=count).argmax(-1)
            read += count


def main() -> None:
    """Read the command line and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reasoner")
    parser.add_argument("--policies", nargs="+", default=["rkv-density", "rkv", "snapkv"], help="names or files")
    parser.add_argument("--family", choices=("prompt-recall", "trace-recall"), default="prompt-recall")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--distractors", type=int, default=2)
    parser.add_argument("--split", choices=("development", "test"), default="development")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.2, 0.15, 0.1])
    parser.add_argument("--interval", type=int, default=32)
    options = parser.parse_args()
    model, tokenizer = evaluate.load(options.model)
    chosen = problems(options.family, options.steps, options.distractors, options.split, options.count)
    print("| share | policy | solved | read before the first wrong guess, mean |\n|---|---|---|---|")
    for share in options.shares:
        for name in options.policies:
            policy = evaluate.policy_at(name, chosen, share, options.interval).build()
            found = first_wrong(model, tokenizer, policy, chosen)
            lengths = [len(p.solution.split()) for p in chosen]
            read = sum((n if at is None else at) / n for at, n in zip(found, lengths, strict=True)) / len(found)
            solved = sum(at is None for at in found)
            print(f"| {share:.2f} | {name} | {solved}/{len(found)} | {read:.2f} |", flush=True)


if __name__ == "__main__":
    main()
