"""Train the reasoning model that ships with kvpolicy: from scratch, on one CPU core, reproducible and resumable.

    python examples/reasoning_model/train.py --out runs/reasoner --seed 0

The run can be stopped at any time; the same command goes on where the last checkpoint was written. The result is an
ordinary model folder, ``<out>/model``, with weights, tokenizer and ``training_log.csv``.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvpolicy.study.tasks import Redundancy, Size, SolvedProblem, draw
from kvpolicy.study.wording import NAMES, Family, Form

sys.path.insert(0, str(Path(__file__).resolve().parent))
from untrained import SHIPPED, Shape, build_model, build_tokenizer

TOKENS_PER_STEP: Final = 2600
IGNORED: Final = -100


@dataclass(frozen=True)
class Part:
    """A kind of problem in a stage: its share of the steps, and the range of its size.

    Two forms are no problems yet. "recall" is a list of lines, then the same lines in another order: it teaches what
    the walk needs first, to find a name and read on from there, on which walks alone stall for hundreds of steps. "sum"
    is a row of sums: a solution holds one new sum in a hundred tokens, which is little to learn to add from.
    """

    share: float
    family: Family
    form: Form | Literal["recall", "sum"]
    steps: tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """A number of training steps on a mixture; ``alike`` is the share of problems with one or two distinct digits.

    Where all digits are alike, the digit does not tell the lines apart, so the *name* must be used to find the next
    line. ``tokens`` is how many a step holds at most, if its last problem is no longer than the others.
    ``restart`` begins a new decay of the learning rate at this share of the peak. ``forget`` begins with empty moments
    of the optimizers, so that weights alone are enough to go on from.
    """

    length: int
    parts: tuple[Part, ...]
    alike: float = 0.3
    tokens: int = TOKENS_PER_STEP
    restart: float | None = None
    forget: bool = False


# The first stages are about two families; restated-recall, which is much like trace-recall, comes after them.
FAMILIES: Final[tuple[Family, ...]] = ("prompt-recall", "trace-recall")
RECALL: Final = tuple(Part(1, family, "recall", (2, 7)) for family in FAMILIES)
SUM: Final = tuple(Part(0.5, family, "sum", (8, 12)) for family in FAMILIES)
SHORT_WALK: Final = tuple(Part(1, family, "walk", (2, 6)) for family in FAMILIES)
WALK: Final = tuple(Part(1, family, "walk", (2, 13)) for family in FAMILIES)
BRIEF: Final = tuple(Part(1, family, "brief", (2, 13)) for family in FAMILIES)
SHORT: Final = tuple(Part(1, family, "full", (1, 4)) for family in FAMILIES)
PUBLISHED: Final = (
    Part(0.15, "prompt-recall", "full", (2, 6)),
    Part(0.15, "trace-recall", "full", (2, 8)),
    Part(0.35, "prompt-recall", "full", (6, 12)),
    Part(0.35, "trace-recall", "full", (8, 15)),
)
RESTATED: Final = (Part(0.15, "restated-recall", "full", (2, 10)), Part(0.35, "restated-recall", "full", (10, 18)))
AGAIN: Final = tuple(replace(part, share=part.share / 2) for part in PUBLISHED)
CURRICULUM: Final = (
    Stage(400, RECALL, tokens=1300),
    Stage(500, (*SHORT_WALK, *SUM), tokens=1300),
    Stage(400, (*WALK, *SUM, *BRIEF), tokens=1300),
    Stage(300, (*BRIEF, *SHORT, *SUM)),
    Stage(
        800,
        (
            Part(0.05, "prompt-recall", "sum", (8, 12)),
            Part(0.05, "trace-recall", "sum", (8, 12)),
            Part(0.1, "prompt-recall", "brief", (4, 14)),
            Part(0.1, "trace-recall", "brief", (4, 16)),
            Part(0.35, "prompt-recall", "full", (2, 6)),
            Part(0.35, "trace-recall", "full", (2, 8)),
        ),
    ),
    # The last two know one form only, at all lengths that are published: the published prompt names no form, so no
    # word in it, once evicted, can change the wording of the solution.
    Stage(1200, PUBLISHED, alike=0.2),
    Stage(800, PUBLISHED, alike=0.0, tokens=4000, restart=0.3),
    Stage(
        600,
        (
            Part(0.1, "restated-recall", "walk", (2, 14)),
            Part(0.3, "restated-recall", "brief", (2, 14)),
            Part(0.3, "restated-recall", "full", (1, 8)),
            Part(0.15, "prompt-recall", "full", (2, 12)),
            Part(0.15, "trace-recall", "full", (2, 15)),
        ),
        restart=0.5,
        forget=True,
    ),
    Stage(1400, (*RESTATED, *AGAIN), alike=0.2),
    Stage(500, (*RESTATED, *AGAIN), alike=0.0, tokens=4000),
)


def stage_of(step: int, curriculum: Sequence[Stage]) -> int:
    """Return the index of the stage that a step belongs to."""
    for index, stage in enumerate(curriculum):
        if step < stage.length:
            return index
        step -= stage.length
    return len(curriculum) - 1


def batch(step: int, seed: int, stage: Stage, encode: dict[str, int]) -> tuple[Part, Tensor, Tensor]:
    """Return the part drawn for a step, its tokens `[B, T]` int64 and its labels `[B, T]` (prompt and padding ignored).

    A pure function of step and seed, so a resumed run sees what an unbroken one sees. All problems of a step have the
    same number of steps, so they are nearly equally long.
    """
    rng = random.Random(f"{seed}/{step}")  # noqa: S311
    part = rng.choices(stage.parts, [part.share for part in stage.parts])[0]
    steps = rng.randint(*part.steps)
    rows: list[tuple[list[str], list[bool]]] = []
    while not rows or (len(rows) + 1) * max(len(row) for row, _ in rows) <= stage.tokens:
        if part.form == "recall":
            rows.append(_recall(rng, part.family, steps))
        elif part.form == "sum":
            rows.append(_sums(rng, part.family, steps))
        else:
            problem = _problem(rng, part.family, part.form, steps, alike=rng.random() < stage.alike)
            prompt, solution = ["<bos>", *problem.prompt.split()], [*problem.solution.split(), "<eos>"]
            rows.append((prompt + solution, [False] * len(prompt) + [True] * len(solution)))
    tokens = torch.full((len(rows), max(len(row) for row, _ in rows)), encode["<pad>"])
    labels = torch.full_like(tokens, IGNORED)
    for index, (row, graded) in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor([encode[word] for word in row])
        wanted = [encode[word] if yes else IGNORED for word, yes in zip(row, graded, strict=True)]
        labels[index, : len(row)] = torch.tensor(wanted)
    return part, tokens, labels


def _problem(rng: random.Random, family: Family, form: Form, steps: int, *, alike: bool) -> SolvedProblem:
    digits = tuple(rng.sample(range(1, 10), rng.randint(1, 2))) if alike else tuple(range(1, 10))
    if family == "prompt-recall":
        size = Size(steps, distractors=rng.randint(0, 3))
    else:
        size = Size(steps, asked=rng.randint(1, min(4, steps)))
    if family == "restated-recall":
        size = replace(size, redundancy=rng.choice(get_args(Redundancy)))
    return draw(rng, family, size, form=form, digits=digits)


def _recall(rng: random.Random, family: Family, count: int) -> tuple[list[str], list[bool]]:
    """Return the words of a list of lines and of the same lines in another order, and which of them are graded."""
    names = rng.sample(NAMES, len(NAMES))
    first, others = names[:count], names[count:]
    more = 1 if family == "prompt-recall" else 2
    lines = [[name, str(rng.randint(1, 9)), *rng.choices(others, k=more), "."] for name in first]
    again = rng.sample(lines, count)
    prompt = ["<bos>", "list", ":", *(word for line in lines for word in line), "<think>"]
    # The name that begins a line cannot be known.
    graded = [False] * len(prompt) + [place > 0 for line in again for place in range(len(line))]
    return [*prompt, *(word for line in again for word in line)], graded


def _sums(rng: random.Random, family: Family, count: int) -> tuple[list[str], list[bool]]:
    """Return the words of some sums as the family states them, and which of them are graded: the results."""
    words, graded = ["<bos>", "sum", ":"], [False] * 3
    for _ in range(count):
        digits = 2 if family == "prompt-recall" else 1
        before, digit = rng.randrange(10**digits), rng.randint(1, 9)
        after = f"{(before + digit) % 10**digits:0{digits}}"
        known = f"{before:0{digits}}"
        texts = (f"so {' '.join(known)} plus {digit} is", f"adding {digit} to {' '.join(known)} gives")
        text = rng.choice(texts).split()
        words += [*text, *after, "."]
        graded += [False] * len(text) + [True] * digits + [False]
    return words, graded


def learning_rate(step: int, curriculum: Sequence[Stage], peak: float) -> float:
    """Return the learning rate of a step.

    First 60 steps of warm-up, then the peak, and a cosine to 2 % of it over the second half. A stage with `restart`
    begins a cosine of its own, from that share of the peak.
    """
    first, height = 0, 1.0
    length = 0
    for stage in curriculum:
        if stage.restart is not None:
            if step < first + length:
                break
            first, length, height = first + length, 0, stage.restart
        length += stage.length
    if step < 60:
        return peak * (step + 1) / 60
    constant = 0.5 if first == 0 else 0.0
    progress = max(0.0, ((step - first) / length - constant) / (1 - constant))
    return peak * (0.02 + (height - 0.02) * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for embeddings and norms."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(hidden, lr=1.0, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1.0, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def train(
    out: Path, *, seed: int, peak: float, stop: int | None, save_every: int, curriculum: Sequence[Stage],
    shape: Shape = SHIPPED,
) -> None:  # fmt: skip
    """Train up to step ``stop`` (default: the end), going on from the checkpoint in ``out`` if there is one."""
    total = sum(stage.length for stage in curriculum)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed, shape)
    steppers = optimizers(model)
    state = out / "state.pt"
    begin, log = 0, []
    out.mkdir(parents=True, exist_ok=True)
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for stepper, values in zip(steppers, saved["optimizers"], strict=True):
            stepper.load_state_dict(values)
        begin, log = saved["step"], saved["log"]
        print(f"resumed at step {begin} of {total}", flush=True)
    encode = tokenizer.get_vocab()
    window: list[dict[str, float | str]] = []
    start = time.perf_counter()
    end = total if stop is None else min(stop, total)
    for step in range(begin, end):
        number = stage_of(step, curriculum)
        if curriculum[number].forget and step == sum(stage.length for stage in curriculum[:number]):
            steppers = optimizers(model)
        part, tokens, labels = batch(step, seed, curriculum[number], encode)
        logits = model(tokens).logits[:, :-1]
        wanted = labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = learning_rate(step, curriculum, peak)
            stepper.step()
            stepper.zero_grad()
        wrong = (logits.argmax(-1) != wanted) & (wanted != IGNORED)
        window.append(
            {
                "kind": f"{part.family} {part.form}",
                "loss": float(loss.detach()),
                "wrong": float(wrong.sum() / (wanted != IGNORED).sum()),
                "exact": float((~wrong.any(1)).float().mean()),
            }
        )
        if (step + 1) % 50 == 0 or step + 1 == end:
            rows = list(_summary(step + 1, number, window))
            log += rows
            window = []
            for row in rows:
                print(*row.values(), f"{(time.perf_counter() - start) / (step + 1 - begin):.2f} s/step", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == end:
            _save_state(state, model, steppers, step + 1, log)
    save_model(out / "model", model, tokenizer, log)


def _summary(step: int, stage: int, window: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for kind in sorted({row["kind"] for row in window}):
        rows = [row for row in window if row["kind"] == kind]
        means = {what: sum(row[what] for row in rows) / len(rows) for what in ("loss", "wrong", "exact")}
        yield {
            "step": step,
            "stage": stage + 1,
            "kind": kind,
            "loss": round(means["loss"], 5),
            "token_accuracy": round(1 - means["wrong"], 5),
            "exact": round(means["exact"], 4),
        }


def _save_state(
    path: Path, model: PreTrainedModel, steppers: list[torch.optim.Optimizer], step: int, log: list[dict[str, Any]]
) -> None:
    values = {
        "model": model.state_dict(),
        "optimizers": [stepper.state_dict() for stepper in steppers],
        "step": step,
        "log": log,
    }
    torch.save(values, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)  # a killed run leaves the old checkpoint whole


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, log: list[dict[str, Any]]
) -> None:
    """Write weights, tokenizer and training log as a folder that ``from_pretrained`` reads."""
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if log:
        with (folder / "training_log.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, log[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(log)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reasoner"), help="folder for checkpoints and the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--stop", type=int, help="stop after this step; the same command goes on from there")
    parser.add_argument("--save-every", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--stages", type=int, default=len(CURRICULUM), help="of the curriculum: 7 know two families")
    own = parser.add_argument_group("another shape than the shipped model's")
    own.add_argument("--heads", type=int, default=SHIPPED.heads, help="query heads")
    own.add_argument("--kv-heads", type=int, default=SHIPPED.kv_heads)
    own.add_argument("--head-dim", type=int, default=SHIPPED.head_dim)
    own.add_argument("--theta", type=float, default=SHIPPED.theta, help="base of the rotary embedding")
    own.add_argument("--no-qk-norm", action="store_true", help="Llama instead of Qwen3")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    torch.set_num_threads(options.threads)
    train(
        options.out,
        seed=options.seed,
        peak=options.lr,
        stop=options.stop,
        save_every=options.save_every,
        curriculum=CURRICULUM[: options.stages],
        shape=Shape(options.heads, options.kv_heads, options.head_dim, options.theta, not options.no_qk_norm),
    )


if __name__ == "__main__":
    main()
