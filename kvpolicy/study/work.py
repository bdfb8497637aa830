"""What a worker does: one batch of runs, whether in this process, in another one or on another machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvpolicy.errors import KVPolicyError
from kvpolicy.runtimes.opening import encode, first_line
from kvpolicy.runtimes.splitting import Splitter
from kvpolicy.spec import PolicySpec
from kvpolicy.study.grading import grade
from kvpolicy.study.metrics import RunKind
from kvpolicy.study.models import ModelRef, end_tokens, load
from kvpolicy.study.problem import Compress, Problem
from kvpolicy.study.sampling import Sampling


@dataclass(frozen=True)
class Item:
    """One run of a task.

    Attributes:
        problem: what the model is given.
        seed: seed of the sampling.
        teacher: the answer that is read under teacher forcing, as tokens; empty for free text and for generation.
    """

    problem: Problem
    seed: int = 0
    teacher: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """A batch of runs that differ in problem and seed only; plain values, so that it travels.

    Attributes:
        kind: generate or force.
        model: which model.
        policy: `PolicySpec.to_data()`.
        items: the runs.
        sampling: how tokens are chosen.
        attention: also measure the attention mass kept (force).
        threads: threads of torch; None leaves them alone.
        compress: what is compressed to the budget once; None leaves that to the policy's trigger and phase.
    """

    kind: RunKind
    model: ModelRef
    policy: dict[str, Any]
    items: tuple[Item, ...]
    sampling: Sampling
    attention: bool = False
    threads: int | None = None
    compress: Compress | None = None


@dataclass(frozen=True)
class Outcome:
    """What one run gave.

    Attributes:
        error: one sentence if it failed, otherwise None.
        metrics: numbers by name.
        output: the generated text.
        tokens: the generated tokens.
        prompt_tokens: tokens of the prompt.
    """

    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    output: str = ""
    tokens: tuple[int, ...] = ()
    prompt_tokens: int = 0


def execute(task: Task) -> list[Outcome]:
    """Run a task; return one outcome per item, failures included.

    When a batch fails, its halves are run, so that one bad run, or too little memory, does not take the others along.

    Raises:
        KVPolicyError: the model cannot be loaded.
    """
    import torch

    if task.threads is not None:
        torch.set_num_threads(task.threads)
    model, tokenizer = load(task.model)
    return _outcomes(task, task.items, model, tokenizer)


def _outcomes(task: Task, items: Sequence[Item], model: Any, tokenizer: Any) -> list[Outcome]:
    try:
        run = _generate if task.kind == "generate" else _force
        return run(task, items, model, tokenizer)
    except Exception as error:  # noqa: BLE001 - a failure is a result: it is recorded and the rest goes on
        if len(items) == 1:
            known = isinstance(error, KVPolicyError)
            return [Outcome(error=str(error) if known else f"{type(error).__name__}: {first_line(error)}.")]
    middle = len(items) // 2
    return [*_outcomes(task, items[:middle], model, tokenizer), *_outcomes(task, items[middle:], model, tokenizer)]


def _generate(task: Task, items: Sequence[Item], model: Any, tokenizer: Any) -> list[Outcome]:
    from kvpolicy.runtimes.hf.positions import check_length
    from kvpolicy.study.choosing import row_key
    from kvpolicy.study.decoding import PromptRow, generate_batch

    policy, rows = PolicySpec(**task.policy).build(), []
    for item in items:
        check_length(model, [policy], tokenizer, item.problem.prompt, "prompt")
        prompt = prompt_ids(tokenizer, item.problem)
        context = _context(task, tokenizer, item.problem, prompt)
        rows.append(PromptRow(prompt, item.seed, row_key(item.problem.digest), context))
    answers = generate_batch(model, policy, rows, task.sampling, end_tokens(model, tokenizer), task.compress)
    outcomes = []
    for item, row, answer in zip(items, rows, answers, strict=True):
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        metrics = {**grade(item.problem, text), "tokens": float(len(answer.tokens)), **answer.usage.metrics()}
        outcomes.append(Outcome(None, metrics, text, tuple(answer.tokens), len(row.prompt)))
    return outcomes


def _force(task: Task, items: Sequence[Item], model: Any, tokenizer: Any) -> list[Outcome]:
    from kvpolicy.study.forcing import force_batch

    texts = [_text(task, tokenizer, item) for item in items]
    policy = PolicySpec(**task.policy).build()
    compared = force_batch(model, policy, texts, attention=task.attention, compress=task.compress)
    return [
        Outcome(
            None, {"forced_tokens": float(found.count), **found.metrics(attention=task.attention)}, "", (), text.prompt
        )
        for text, found in zip(texts, compared, strict=True)
    ]


def prompt_ids(tokenizer: Any, problem: Problem) -> list[int]:
    """Return the tokens that a model is given of a problem, behind its chat template where it has one."""
    templated = problem.chat is not False and getattr(tokenizer, "chat_template", None) is not None
    # Behind a template the beginning of the answer stands on its own; without one it is part of the text.
    told = problem.prompt if templated else problem.prompt + problem.prefix
    ids: list[int] = encode(tokenizer, told, problem.chat, option="chat")["input_ids"][0].tolist()
    if templated and problem.prefix:
        ids += tokenizer(problem.prefix, add_special_tokens=False)["input_ids"]
    return ids


def _context(task: Task, tokenizer: Any, problem: Problem, prompt: Sequence[int]) -> int:
    """Return how many tokens of a prompt are its context, where that is what is compressed."""
    if task.compress != "context":
        return 0
    splitter = Splitter(tokenizer, chat=problem.chat)
    return splitter.length_in(prompt, problem.context, problem.prompt)


def _text(task: Task, tokenizer: Any, item: Item) -> Any:
    from kvpolicy.study.forcing import ForcedText

    problem = item.problem
    if not problem.text:
        prompt = prompt_ids(tokenizer, problem)
        if len(item.teacher) < 2:
            raise KVPolicyError(f"the full cache's answer has {len(item.teacher)} tokens; at least 2 are needed.")
        return ForcedText([*prompt, *item.teacher], len(prompt), _context(task, tokenizer, problem, prompt))
    prompt_tokens, wanted = problem.cut
    tokens = tokenizer(problem.text)["input_ids"][:wanted]
    if len(tokens) < wanted:
        raise KVPolicyError(
            f"text {problem.index} has {len(tokens)} tokens, but {wanted} are asked for; write fewer `tokens`."
        )
    return ForcedText(tokens, prompt_tokens)
