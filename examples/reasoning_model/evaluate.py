"""Measure a reasoning model under eviction policies: exact answers and steps done right, per family and length.

    python examples/reasoning_model/evaluate.py --split test --count 100
    python examples/reasoning_model/evaluate.py --policies full rkv random --share 0.2 --split development --count 20

Decoding is greedy. A budget is a share of the mean length of prompt and full solution at that length, in whole entries.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpolicy
from kvpolicy.runtimes.hf import generate
from kvpolicy.runtimes.opening import REASONER, locate
from kvpolicy.spec import PolicySpec
from kvpolicy.study.tasks import REDUNDANCIES, Grade, Level, Redundancy, SolvedProblem, grade, problems
from kvpolicy.study.wording import Family


def load(name: str) -> tuple[Any, Any]:
    """Return model (fp32) and tokenizer."""
    folder = locate(name, user="the evaluation")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def length(problem: SolvedProblem) -> int:
    """Return the tokens of prompt and solution, ``<bos>`` and ``<eos>`` included."""
    return len(problem.prompt.split()) + len(problem.solution.split()) + 2


def policy_at(name: str, chosen: Sequence[SolvedProblem], share: float, interval: int) -> PolicySpec:
    """Return a policy whose budget is a share of the mean length of some problems."""
    if name == "full":
        return kvpolicy.load(name)
    budget = round(share * statistics.mean(map(length, chosen)))
    return kvpolicy.load(name, budget=budget).replace("trigger", {"every": interval})


def grades(
    model: Any, tokenizer: Any, chosen: Sequence[SolvedProblem], spec: PolicySpec, batch_size: int
) -> list[Grade]:
    """Return the grades of greedy answers, in order of the problems; a text may be a tenth longer than the solution."""
    found = []
    for first in range(0, len(chosen), batch_size):
        group = chosen[first : first + batch_size]
        inputs = tokenizer([problem.prompt for problem in group], padding=True, return_tensors="pt")
        limit = int(1.1 * max(len(problem.solution.split()) for problem in group))
        with torch.inference_mode():
            output, _ = generate(
                model,
                {name: inputs[name] for name in ("input_ids", "attention_mask")},
                spec,
                max_new_tokens=limit,
                do_sample=False,
            )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [grade(problem, text) for problem, text in zip(group, texts, strict=True)]
    return found


def main() -> None:
    """Read the command line and print a Markdown table, one row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=REASONER, help="folder, hub id, or the name of the shipped model")
    parser.add_argument("--policies", nargs="+", default=["full"])
    parser.add_argument("--share", type=float, default=0.2, help="budget as a share of the full trace")
    parser.add_argument("--interval", type=int, default=32)
    parser.add_argument("--families", nargs="+", choices=get_args(Family), default=get_args(Family))
    parser.add_argument("--levels", nargs="+", choices=get_args(Level), default=get_args(Level))
    parser.add_argument(
        "--redundancies", nargs="+", type=int, choices=get_args(Redundancy), default=get_args(Redundancy)
    )
    parser.add_argument("--split", choices=("development", "test"), default="development")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--batch", type=int, default=25)
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    print("| family | length | said again | tokens | policy | budget | exact | steps right |")
    print("|---|---|---|---|---|---|---|---|")
    for family in options.families:
        cells = [(level, times) for level in options.levels for times in REDUNDANCIES[family]]
        for level, times in cells:
            if times not in (None, *options.redundancies):
                continue
            chosen = list(problems(family, level, options.split, options.count, redundancy=times))
            tokens = round(statistics.mean(map(length, chosen)))
            for name in options.policies:
                spec = policy_at(name, chosen, options.share, options.interval)
                result = grades(model, tokenizer, chosen, spec, options.batch)
                exact, progress = sum(g.exact for g in result), statistics.mean(g.progress for g in result)
                budget = spec.budget.tokens or "all"
                print(
                    f"| {family} | {level} | {times or ''} | {tokens} | {name} | {budget} | {exact}/{len(result)} "
                    f"| {progress:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
