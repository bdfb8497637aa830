"""`kvpolicy trace`: a model under a policy, and a page that shows what it kept of the text and why."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from kvpolicy.cli.generating import GenerationRequest
    from kvpolicy.spec import PolicySpec
    from kvpolicy.trace.recording import Recording


@dataclass(frozen=True)
class _TracedText:
    """Token ids, how many of them are the prompt, and how many went into the cache."""

    tokens: list[int]
    prompt: int
    seen: int


def trace(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The prompt; - reads it from standard input. Optional with --text."),
    ] = None,
    *,
    model: Annotated[
        str, typer.Option(help="A model folder, an id on the Hugging Face hub, smollm2 (the demo model) or reasoner.")
    ] = "smollm2",
    policy: Annotated[str, typer.Option(metavar="NAME|FILE", help="The policy.")] = "rkv",
    compare: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A second policy, shown beside the first.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="KV entries per head (256), or a share of the tokens seen (0.1); for both policies, unless one keeps "
            "everything.",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read this text after the prompt instead of generating one.")
    ] = None,
    same_text: Annotated[
        bool, typer.Option("--same-text", help="With --compare: the second policy reads what the first one wrote.")
    ] = False,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")] = Path("trace.html"),
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop after so many tokens; 256 by default.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the most likely tokens with this mass.")] = None,
    seed: Annotated[int | None, typer.Option(help="Sample with this seed. Without these three: greedy.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Apply the chat template; by default if there is one.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")] = "auto",
) -> None:
    """Record every compaction of a text and write a page that shows what was kept, by whom, for how long and why."""
    from kvpolicy.cli.generating import GenerationRequest, prompt_of
    from kvpolicy.errors import KVPolicyError

    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    request = GenerationRequest(
        prompt=prompt_of(prompt or ""),
        model=model,
        policies=(policy, *([compare] if compare is not None else [])),
        budget=budget,
        max_new_tokens=max_new_tokens,
        sampling={name: value for name, value in sampling.items() if value is not None},
        chat=chat,
        device=device,
        dtype=dtype,
    )
    if text is not None:
        given = {**sampling, "max_new_tokens": max_new_tokens}
        unused = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
        if unused or same_text:
            option = unused[0] if unused else "--same-text"
            why = "nothing is generated" if unused else "both policies read the same text already"
            raise KVPolicyError(f"{option}: with --text {why}; leave {option} out.")
    elif same_text and compare is None:
        raise KVPolicyError("--same-text: there is one policy; name a second one with --compare.")
    if not request.prompt.strip() and (text is None or prompt is not None):
        raise KVPolicyError("PROMPT is empty; write the text to continue, or a file to read with --text.")
    _run(request, text, out, same_text=same_text)


def _run(request: GenerationRequest, file: Path | None, out: Path, *, same_text: bool) -> None:
    from kvpolicy.cli.generating import budget_of, check_sampling, described, encode_within, load_model
    from kvpolicy.cli.terminal import messages, output
    from kvpolicy.errors import KVPolicyError
    from kvpolicy.inputs import expanded
    from kvpolicy.outputs import replace_file

    # What is wrong with a policy or a file is said before a model is loaded.
    specs = [_load(name, budget_of(request.budget)) for name in request.policies]
    check_sampling(request)
    written = None if file is None else _read(file)
    if out.is_dir() or not out.absolute().parent.is_dir():
        reason = "is a folder" if out.is_dir() else "is in a folder that does not exist"
        raise KVPolicyError(f"--out: {out} {reason}; name a file such as trace.html.")
    note, console = messages(), output()
    with note.status(f"loading {request.model}"):
        model, tokenizer = load_model(request, note, user="trace")
    from kvpolicy.trace.about import details, made
    from kvpolicy.trace.page import Shown, trace_page
    from kvpolicy.trace.pieces import pieces

    given = None if written is None else _given(model, tokenizer, request, written, specs)
    inputs = None
    if given is None:
        inputs, request = encode_within(model, tokenizer, request, specs)
    shown = []
    for spec in specs:
        if given is None:
            console.rule(f"{spec.policy}, {described(spec)}", align="left")
            tokens, recording = _generate(model, tokenizer, inputs, spec, request, console)
            console.print()
            if same_text:
                given = _TracedText(tokens, recording.prompt, recording.seen)
        else:
            tokens, recording = given.tokens, _reading(model, given, spec, note)
        texts, special = pieces(tokenizer, tokens)
        shown.append(Shown(spec.policy, described(spec), texts, special, recording, details(spec)))
    name = expanded(request.model)
    page = trace_page(
        shown,
        name.resolve().name if name.is_dir() else request.model,
        same_text=given is not None,
        made=made(str(model.dtype).removeprefix("torch.")),
    )
    replace_file(out, page, "--out")
    for one, spec in zip(shown, specs, strict=True):
        console.print(f"{one.policy}: {_summary(one.recording)}", soft_wrap=True)
        if file is not None and spec.phase == "prefill":
            console.print(
                f"{one.policy}: compacts prompts only, and here the prompt is {one.recording.prompt:,} of "
                f"{one.recording.seen:,} tokens; to see it compress the text, make that the prompt: "
                f"kvpolicy trace --policy {shlex.quote(spec.policy)} - < {shlex.quote(str(file))}",
                soft_wrap=True,
            )
    console.print(f"{out}: {len(page.encode()) / 1e3:,.0f} kB; open it in a browser.", soft_wrap=True)


def _load(name: str, budget: float | None) -> PolicySpec:
    import kvpolicy

    own = kvpolicy.load(name)
    return own if budget is None or own.budget.fraction == 1 else kvpolicy.load(name, budget=budget)


def _read(file: Path) -> str:
    from kvpolicy.errors import KVPolicyError
    from kvpolicy.inputs import read_text

    text = read_text(file, "text file", option="--text")
    if not text.strip():
        raise KVPolicyError(f"--text: {file} is empty; name a file with the text to read.")
    return text


def _given(
    model: Any, tokenizer: Any, request: GenerationRequest, text: str, specs: Sequence[PolicySpec]
) -> _TracedText:
    """Return the prompt's tokens and those of the text behind it; without a prompt the first token is the prompt."""
    from kvpolicy.errors import KVPolicyError
    from kvpolicy.runtimes.hf.positions import check_length, positions_left
    from kvpolicy.runtimes.opening import encode

    if not request.prompt and request.chat:
        raise KVPolicyError("--chat: there is no PROMPT to put into the chat template; write one or leave it out.")
    policies = [spec.build() for spec in specs]
    check_length(model, policies, tokenizer, request.prompt + text, "--text")
    prompt: list[int] = []
    if request.prompt:
        prompt = encode(tokenizer, request.prompt, request.chat)["input_ids"][0].tolist()
    tokens = prompt + tokenizer(text, add_special_tokens=not prompt)["input_ids"]
    for policy in policies:
        positions_left(model, policy, len(tokens), "--text", least=0)
    return _TracedText(tokens, len(prompt) or 1, len(tokens))


def _generate(
    model: Any, tokenizer: Any, inputs: Any, spec: PolicySpec, request: GenerationRequest, console: Console
) -> tuple[list[int], Recording]:
    from kvpolicy.cli.generating import generation_options
    from kvpolicy.cli.streaming import TextStream
    from kvpolicy.trace.running import record_generation

    options = generation_options(tokenizer, request)
    return record_generation(
        model, inputs, spec.build(), stream=lambda cache: TextStream(tokenizer, console, cache), **options
    )


def _reading(model: Any, text: _TracedText, spec: PolicySpec, note: Console) -> Recording:
    from kvpolicy.trace.running import record_reading

    with note.status(f"reading under {spec.policy}") as status:
        return record_reading(
            model, text.tokens[: text.seen], text.prompt, spec.build(),
            step=lambda at: status.update(f"reading under {spec.policy}: {at} of {text.seen} tokens"),
        )  # fmt: skip


def _summary(recording: Recording) -> str:
    done = len(recording.compactions)
    if not done:
        return f"{recording.seen:,} tokens seen and no compaction; a smaller --budget or a longer text shows more."
    held = recording.held(recording.seen).sum() / len(recording.evicted)
    counted = f"{done} compaction{'s' if done > 1 else ''}"
    return f"{recording.seen:,} tokens seen, {counted}, {held:,.0f} entries per head held at the end."
