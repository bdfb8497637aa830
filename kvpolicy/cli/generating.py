"""`kvpolicy generate`: text as it comes, then a table of what the cache held."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import kvpolicy
from kvpolicy.cli.generated import Generation, table
from kvpolicy.cli.terminal import messages, output
from kvpolicy.contracts.component import LONGEST_TEXT
from kvpolicy.errors import KVPolicyError
from kvpolicy.inputs import MAX_TEXT_BYTES
from kvpolicy.loading.entries import shown
from kvpolicy.runtimes.opening import encode
from kvpolicy.spec import PolicySpec
from kvpolicy.study.sampling import COLDEST, HOTTEST

if TYPE_CHECKING:
    from rich.console import Console

MOST_SEEDS: Final = 1 << 63


@dataclass(frozen=True)
class GenerationRequest:
    """What the command line asks for."""

    prompt: str
    model: str
    policies: tuple[str, ...]
    budget: str | None = None
    max_new_tokens: int | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)
    chat: bool | None = None
    device: str = "auto"
    dtype: str = "auto"


def run(request: GenerationRequest) -> None:
    """Generate under each policy and print text and table; raises KVPolicyError with one sentence."""
    # What is wrong with a policy is said before a model is loaded.
    specs = [kvpolicy.load(request.policies[0], budget=budget_of(request.budget))]
    specs += [kvpolicy.load(name) for name in request.policies[1:]]
    prompt = prompt_of(request.prompt)
    if not prompt.strip():
        raise KVPolicyError("PROMPT is empty; write the text to continue or the question to answer.")
    check_sampling(request)
    note = messages()
    with note.status(f"loading {request.model}"):
        model, tokenizer = load_model(request, note)
    inputs, request = encode_within(model, tokenizer, replace(request, prompt=prompt), specs)
    console = output()
    if len(specs) > 1:
        _warm_up(model, inputs)
    runs = []
    for spec in specs:
        console.rule(f"{spec.policy}, {described(spec)}", align="left")
        runs.append(_generate(model, tokenizer, inputs, spec, request, console))
        console.print()
    console.print(table(runs))
    for done, spec in zip(runs, specs, strict=True):
        if not done.stats.compactions and spec.budget.fraction != 1:
            console.print(untouched(spec, done.stats.seen))


def prompt_of(text: str) -> str:
    """Return the prompt that an argument stands for, ``-`` for what standard input says; raises KVPolicyError."""
    try:
        if text == "-":
            text = sys.stdin.read(MAX_TEXT_BYTES + 1)
        text.encode()
    except UnicodeError:
        raise KVPolicyError("PROMPT is not UTF-8 text; write it in UTF-8.") from None
    if len(text) > MAX_TEXT_BYTES:
        raise KVPolicyError(f"PROMPT is longer than {MAX_TEXT_BYTES >> 20} MiB; give a shorter one.")
    return text


def budget_of(text: str | None) -> float | None:
    """Return what ``--budget`` says: entries as an integer, a share as a float; raises KVPolicyError."""
    if text is None:
        return None
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise KVPolicyError(f"--budget: {text!r} is not a number; write 256 for entries or 0.1 for a share.")


def described(spec: PolicySpec) -> str:
    """Return a policy's budget in words."""
    budget = spec.budget
    if budget.tokens is not None:
        return f"budget {budget.tokens}"
    return "keeps everything" if budget.fraction == 1 else f"keeps {budget.fraction:g} of the tokens"


def untouched(spec: PolicySpec, seen: int) -> str:
    """Say why a policy did nothing to a text of so many tokens, and how to see it at work."""
    if spec.phase == "prefill":
        why, how = "the prompt is too short for it", "Give a longer prompt or a smaller --budget."
    elif spec.budget.tokens is None:
        why, how = "the text is too short for it", "Give a longer prompt or more --max-new-tokens."
    else:
        most = spec.build().bound
        why = f"{seen:,} tokens do not exceed the {most:,} entries that it may hold"
        how = "Give a smaller --budget, a longer prompt or more --max-new-tokens."
    return f"{spec.policy}: nothing was compacted, for {why}; this was the full cache. {how}"


def check_sampling(request: GenerationRequest) -> None:
    """Raise KVPolicyError when an option for the choice of tokens makes no sense."""
    sampling = request.sampling
    if (request.max_new_tokens or 0) > LONGEST_TEXT:
        raise KVPolicyError(f"--max-new-tokens: {shown(request.max_new_tokens)} should be at most {LONGEST_TEXT}.")
    temperature, seed = sampling.get("temperature", 1.0), int(sampling.get("seed", 0))
    if not COLDEST <= temperature <= HOTTEST:
        raise KVPolicyError(
            f"--temperature: {temperature:g} should be from {COLDEST:g} to {HOTTEST:g}; leave all sampling options out "
            "for greedy decoding."
        )
    if not 0 <= seed < MOST_SEEDS:
        raise KVPolicyError(f"--seed: {shown(seed)} should be at least 0 and less than 2**63; write another one.")
    if not 0 < sampling.get("top_p", 1.0) <= 1:
        raise KVPolicyError(f"--top-p: should be above 0 and at most 1, got {sampling['top_p']:g}.")


def load_model(request: GenerationRequest, note: Console, *, user: str = "generate") -> tuple[Any, Any]:
    """Return model and tokenizer for the command `user`; raises KVPolicyError when they cannot be loaded."""
    from kvpolicy.runtimes.opening import check_device, locate, open_model, open_tokenizer, require_transformers

    require_transformers(user)
    import torch

    # What is wrong with these is said before the demo model is made.
    device = request.device if request.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    dtype = "float32" if request.dtype == "auto" and device == "cpu" else request.dtype
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise KVPolicyError(f"--dtype: {dtype!r} is not one of auto, float32, bfloat16, float16.")
    place = locate(request.model, user=user, say=note.print)
    tokenizer = open_tokenizer(place, request.model, say=note.print)
    return open_model(place, request.model, dtype=dtype, device=device), tokenizer


def encode_within(
    model: Any, tokenizer: Any, request: GenerationRequest, specs: Sequence[PolicySpec]
) -> tuple[Any, GenerationRequest]:
    """Return the prompt's tokens where the model is, and the request with the most new tokens that all policies can do.

    Raises:
        KVPolicyError: the prompt, or as many new tokens as are asked for, do not fit the model's positions.
    """
    from kvpolicy.runtimes.hf.answering import new_tokens
    from kvpolicy.runtimes.hf.positions import check_length

    policies = [spec.build() for spec in specs]
    check_length(model, policies, tokenizer, request.prompt, "PROMPT")
    inputs = encode(tokenizer, request.prompt, request.chat).to(model.device)
    length, wanted = inputs["input_ids"].shape[1], request.max_new_tokens
    most = min(new_tokens(model, policy, length, wanted, "PROMPT", option="--max-new-tokens") for policy in policies)
    return inputs, replace(request, max_new_tokens=most)


def _warm_up(model: Any, inputs: Any) -> None:
    """Generate two tokens, so that the first of two runs does not pay for what happens once."""
    model.generate(**inputs, max_new_tokens=2, do_sample=False)


def generation_options(tokenizer: Any, request: GenerationRequest) -> dict[str, Any]:
    """Seed the random numbers and return the arguments of ``model.generate``."""
    import torch

    sampling: dict[str, Any] = dict(request.sampling)
    torch.manual_seed(int(sampling.pop("seed", 0)))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {
        "max_new_tokens": request.max_new_tokens, "do_sample": bool(request.sampling), "pad_token_id": pad, **sampling
    }  # fmt: skip


def _generate(
    model: Any, tokenizer: Any, inputs: Any, spec: PolicySpec, request: GenerationRequest, console: Console
) -> Generation:
    from kvpolicy.cli.streaming import TextStream
    from kvpolicy.runtimes.hf import PolicyCache, generate

    options = generation_options(tokenizer, request)
    with PolicyCache(spec.build(), model) as cache, TextStream(tokenizer, console, cache) as stream:
        start = time.perf_counter()
        generate(model, inputs, cache, streamer=stream, **options)
        seconds = time.perf_counter() - start
        return Generation(spec.policy, stream.tokens, seconds, cache.stats())
