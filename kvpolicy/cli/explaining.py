"""`kvpolicy explain`: a policy in words, and the memory it takes."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvpolicy.cli.memory import ModelShape
    from kvpolicy.policy.policy import Policy
    from kvpolicy.spec import ComponentRef, PolicySpec

LONGEST: Final = 1 << 22
_WIDEST: Final = 110  # longer lines are hard to read
_PHASES: Final = {
    "prefill": "After the steps of the prompt, not while decoding.",
    "decode": "While decoding, never within the prompt.",
    "both": "After the steps of the prompt and while decoding.",
}
_SCOPES: Final = {
    "head": "Each KV head keeps its own set.",
    "layer": "All heads of a layer keep the same set.",
    "model": "All layers and heads keep the same set.",
}


def explain(
    spec: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A policy's name or file.")],
    *,
    model_config: Annotated[
        str | None, typer.Option(metavar="PLACE", help="A model folder, a config.json, or an id on the hub.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Instead: full-attention layers of the model,")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="its KV heads per layer")] = None,
    head_dim: Annotated[int | None, typer.Option(help="and the size of a head.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; as configured by default.")] = None,
    budget: Annotated[str | None, typer.Option(metavar="N", help="Entries per head (256), or a share (0.1).")] = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a row, its prompt included.")] = 8192,
    prompt: Annotated[
        int | None,
        typer.Option(
            help="Tokens of its prompt; 128, or all but the last 256 for a policy that compacts prompts only."
        ),
    ] = None,
) -> None:
    """Say in words what a policy keeps and when, and how much memory it takes for a model, a batch and a length."""
    import kvpolicy
    from kvpolicy.cli.generating import budget_of
    from kvpolicy.cli.terminal import output

    check_lengths({"--batch": batch, "--length": length, "--prompt": prompt}, prompt, length)
    shape = shape_of(model_config, layers, kv_heads, head_dim, dtype)
    found = kvpolicy.load(spec, budget=budget_of(budget))
    policy = found.build()
    prompt = default_prompt(policy, length, prompt)
    sections = words(found, policy), memory(policy, shape, batch, length, prompt)
    console = output()
    width = min(console.width, _WIDEST)
    lines = [textwrap.fill(f"{found.policy}: {found.description}".rstrip(": "), width)]
    for section in sections:
        lines += ["", *(wrapped(label, text, width) for label, text in section)]
    console.print("\n".join(lines), soft_wrap=True)


def check_lengths(numbers: dict[str, int | None], prompt: int | None, length: int) -> None:
    """Raise KVPolicyError for an option that is no length, or a prompt that is longer than the text."""
    from kvpolicy.errors import KVPolicyError

    for option, value in numbers.items():
        if value is not None and not 1 <= value <= LONGEST:
            raise KVPolicyError(f"{option}: {value} makes no sense; write a whole number from 1 to {LONGEST:,}.")
    if prompt is not None and prompt > length:
        raise KVPolicyError(f"--prompt: {prompt} tokens are more than the --length of {length}, which includes them.")


def default_prompt(policy: Policy, length: int, prompt: int | None) -> int:
    """Return the tokens of the prompt: as asked, or so many that the policy has something to do."""
    if prompt is not None:
        return prompt
    return max(length - 256, length // 2, 1) if policy.phase == "prefill" else min(128, length)


def wrapped(label: str, text: str, width: int) -> str:
    """Return a labelled sentence in lines of a width."""
    indent = " " * 12
    return textwrap.fill(text, width, initial_indent=f"{label:<12}", subsequent_indent=indent, break_on_hyphens=False)


def words(spec: PolicySpec, policy: Policy) -> Iterator[tuple[str, str]]:
    """Yield labels and sentences that say what is kept, when, and how it is chosen."""
    if policy.budget.fraction == 1.0:
        yield "keeps", "Everything: the budget is the text itself."
        yield from _traits(policy)
        return
    tokens = policy.budget.tokens
    kept = f"{tokens:,} entries" if tokens is not None else f"{policy.budget.fraction:.4g} of the tokens seen so far,"
    mean = "" if policy.counts == "equal" else ", on average over heads and layers,"
    yield "keeps", f"{kept} per KV head and layer{mean} after a compaction, protected ones included."
    yield "when", _PHASES[spec.phase]
    yield "", _said(spec.trigger)
    if spec.phase != "prefill":  # where only prompts are compacted, a prompt is held whole at first
        yield "", f"Between two compactions up to {policy.trigger.buffer():,} more may be held."
    if spec.prefill_chunk is not None:
        yield "", f"The prompt comes in chunks of {spec.prefill_chunk:,} tokens, counted from its end."
    for ref in spec.protect:
        stays = getattr(ref.component, "effect", "keep") == "keep"
        yield "protected" if stays else "dropped", _said(ref)
    if not spec.protect:
        yield "protected", "Nothing."
    if policy.mixer.uses_importance:
        yield "important", _said(spec.importance)
    if policy.mixer.uses_redundancy:
        yield "redundant", _said(spec.redundancy)
    yield "score", f"{_said(spec.mixer)} The higher, the sooner an entry stays."
    yield "chosen", f"{_said(spec.selector)} {_SCOPES[policy.selector.scope]}"
    yield "split", _said(spec.allocator)
    for ref in spec.post:
        yield "then", _said(ref)
    from kvpolicy.contracts.components import NEEDS

    for need in sorted(policy.needs):
        yield "needs", f"{need}: {NEEDS[need]}."
    yield from _traits(policy)


def _traits(policy: Policy) -> Iterator[tuple[str, str]]:
    """Yield what a runtime must know, with the names that it refuses by."""
    traits = policy.traits
    says = {
        "equal_counts": ("every head holds as many entries", "heads hold different numbers of entries"),
        "length_is_counted": ("lengths follow from counters alone", "lengths are known when the device says them"),
        "re_rotates": ("kept keys get other positions", "positions stay"),
        "whole_prompt": ("the prompt comes in one pass", "the prompt may come in chunks"),
    }
    for number, (name, (yes, no)) in enumerate(says.items()):
        yield "" if number else "runtimes", f"{name}: {yes if getattr(traits, name) else no}."
    states = ", ".join(f"{each.name} ({str(each.dtype).removeprefix('torch.')})" for each in traits.state)
    yield "", f"state: {states or 'none'}."


def _said(ref: ComponentRef) -> str:
    from kvpolicy.cli.listing import summary

    text = summary(type(ref.component))
    held = "".join(f" Its {name} is {_said(inner)}" for name, inner in ref.held.items())
    return f"{ref}: {text}.{held}" if text else f"{ref}.{held}"


def memory(policy: Policy, shape: ModelShape, batch: int, length: int, prompt: int) -> Iterator[tuple[str, str]]:
    """Yield labels and sentences with the bytes of keys and values, beside those of the full cache."""
    from kvpolicy.cli.memory import simulate

    course = simulate(policy, length, prompt)
    each = shape.bytes_per_token
    full, held, peak = (n * each * batch for n in (course.seen, course.resident, course.peak))
    what = " and ".join(
        f"{layers} layer{'s' * (layers > 1)} x {heads} KV heads x (key {dim} + value {dim})"
        for layers, heads, dim in shape.groups
    )
    yield "model", f"{shape.source}: {what}, {shape.dtype}."
    if shape.others:
        yield "", f"{shape.others} further layers keep a window or a state of their own and are not counted."
    yield "per token", f"{size(each)} for one row."
    turns = f"{course.compactions:,} compaction{'' if course.compactions == 1 else 's'}"
    yield "text", f"batch {batch:,}, {length:,} tokens each, {prompt:,} of them the prompt: {turns}."
    bound = policy.bound
    if policy.budget.fraction == 1.0:
        yield "kept", f"All of it, always: {course.seen:,} entries, {size(full)}. Nothing is saved."
        return
    if policy.phase == "prefill":
        yield "at most", "No bound while decoding, for only the prompt is compacted."
    elif bound is None:
        yield "at most", "No bound while decoding, for the budget is a share of the text."
    else:
        mean = "" if policy.counts == "equal" else ", on average over heads and layers,"
        most = size(bound * each * batch)
        yield "at most", f"{bound:,} entries per KV head and layer{mean} while decoding, {most}."
        if prompt > bound:
            yield "", f"More while a prompt of more than {bound:,} tokens comes in."
    yield "peak", f"{course.peak:,} entries, {size(peak)}."
    yield "at the end", f"{course.resident:,} entries, {size(held)}."
    yield "full cache", f"{course.seen:,} entries, {size(full)}."
    yield "saved", f"{size(full - held)} at the end ({1 - held / full:.1%})."
    yield "", f"{size(full - peak)} at the peak ({1 - peak / full:.1%})."
    if not course.compactions:
        yield "", _nothing_compacted(policy, length, prompt)
    state = sum(s.dtype.itemsize for s in policy.slot_states)
    notes = 4 + state + (4 if any(p.changes == "positions" for p in policy.post) else 0)
    yield "besides", f"{notes} bytes per entry, KV head and layer for positions and slot state."


def _nothing_compacted(policy: Policy, length: int, prompt: int) -> str:
    """Say why nothing is saved, and what to ask for instead."""
    if policy.phase == "prefill":
        return (
            f"Nothing is compacted, for a prompt of {prompt:,} tokens is not above the budget; try a longer --prompt."
        )
    return f"Nothing is compacted, for {length:,} tokens do not exceed what may be held; try a longer --length."


def size(count: int) -> str:
    """Write bytes for people and exactly: ``1.50 MiB (1,572,864 bytes)``."""
    from kvpolicy.html_text import size as short

    return short(count) if count < 1024 else f"{short(count)} ({count:,} bytes)"


def shape_of(
    place: str | None, layers: int | None, kv_heads: int | None, head_dim: int | None, dtype: str | None
) -> ModelShape:
    """Return the heads that the options describe, or those of an example; raises KVPolicyError."""
    from kvpolicy.cli.memory import ModelShape, dtype_name, shape_from_config
    from kvpolicy.errors import KVPolicyError

    given = {"--layers": layers, "--kv-heads": kv_heads, "--head-dim": head_dim}
    named = [option for option, value in given.items() if value is not None]
    if place is not None:
        if named:
            raise KVPolicyError(f"{named[0]}: --model-config says it already; give one of them.")
        return shape_from_config(place, dtype)
    if not named:
        # An 8-billion-parameter decoder of the kind that reasons, so that there is something to see.
        return ModelShape(36, 8, 128, dtype_name(dtype or "bfloat16"), source="an example (Qwen3-8B)")
    missing = [option for option, value in given.items() if value is None]
    if missing:
        raise KVPolicyError(f"{missing[0]}: is missing; --layers, --kv-heads and --head-dim go together.")
    for option, value in given.items():
        if value is None or not 1 <= value <= 1 << 20:
            raise KVPolicyError(f"{option}: {value} makes no sense; write a whole number above 0.")
    assert layers is not None
    assert kv_heads is not None
    assert head_dim is not None
    return ModelShape(layers, kv_heads, head_dim, dtype_name(dtype or "bfloat16"), source="as given")
