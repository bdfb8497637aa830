"""`kvpolicy generate --context`: a file is read and compressed once, then questions about it are answered."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvpolicy
from kvpolicy.cli.generated import Generation, table
from kvpolicy.cli.generating import (
    GenerationRequest,
    budget_of,
    check_sampling,
    described,
    generation_options,
    load_model,
    prompt_of,
)
from kvpolicy.cli.terminal import messages, output
from kvpolicy.errors import KVPolicyError
from kvpolicy.inputs import expanded, read_text
from kvpolicy.runtimes.opening import encode
from kvpolicy.spec import PolicySpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console


def run(
    request: GenerationRequest, file: str, questions: Sequence[str], *, chunk: int | None, most: int | None
) -> None:
    """Answer questions about a file under each policy and print text and table; raises KVPolicyError.

    Args:
        request: model, policies and how tokens are chosen.
        file: the context.
        questions: each is asked from the context alone.
        chunk: tokens that are read at once.
        most: tokens of an answer, if the user says how many.
    """
    specs = [kvpolicy.load(request.policies[0], budget=budget_of(request.budget))]
    specs += [kvpolicy.load(name) for name in request.policies[1:]]
    asked = [prompt_of(question) for question in questions]
    text = read_text(expanded(file), "text file", option="--context")
    if not text.strip():
        raise KVPolicyError(f"--context: {Path(file).name!r} is empty; give the text that questions are asked about.")
    for number, question in enumerate(asked, 1):
        if not question.strip():
            raise KVPolicyError(f"question {number} of {len(asked)} is empty; write what is asked.")
    check_sampling(request)
    note = messages()
    with note.status(f"loading {request.model}"):
        model, tokenizer = load_model(request, note)
    encode(tokenizer, "a", request.chat)  # or refuse a chat template that is not there
    console, runs, notes = output(), [], []
    for spec in specs:
        console.rule(f"{spec.policy}, {described(spec)}", align="left")
        options = {**generation_options(tokenizer, request), "max_new_tokens": most}
        done, untouched = _answer(model, tokenizer, text, asked, spec, request, chunk, options, console)
        runs.append(done)
        notes += [untouched] if untouched else []
    console.print(table(runs))
    for sentence in notes:
        console.print(f"{sentence[0].upper()}{sentence[1:]}")


def _answer(
    model: Any,
    tokenizer: Any,
    text: str,
    questions: Sequence[str],
    spec: PolicySpec,
    request: GenerationRequest,
    chunk: int | None,
    options: dict[str, Any],
    console: Console,
) -> tuple[Generation, str]:
    """Return what one policy did and, if it did nothing to the context, a sentence that says so."""
    from kvpolicy.cli.streaming import TextStream
    from kvpolicy.runtimes.hf import ContextCache

    start, replies = time.perf_counter(), []
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        context = ContextCache(spec.build(), model, tokenizer, text, chunk=chunk, chat=request.chat)
    with context:
        for question in questions:
            console.print(f"> {question}", style="dim", soft_wrap=True)
            with TextStream(tokenizer, console, context) as stream:
                replies.append(context.reply(question, streamer=stream, **options))
            console.print()
    seconds = time.perf_counter() - start
    most = max((reply.stats for reply in replies), key=lambda stats: stats.bytes_peak)
    return Generation(spec.policy, sum(len(reply.tokens) for reply in replies), seconds, most), context.untouched
