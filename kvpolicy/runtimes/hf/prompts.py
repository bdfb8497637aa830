"""A prompt that is fed to a cache in pieces, before `generate` or instead of it; a context that is compressed once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.contracts.component import named
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf.given import check_ids, check_whole
from kvpolicy.runtimes.hf.naming import passing
from kvpolicy.runtimes.hf.passes import Passes


@torch.no_grad()
def feed_prompt(
    model: PreTrainedModel,
    cache: object,
    passes: Passes,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    size: int | None,
) -> None:
    """Run a prompt through a cache's model, all but its end; see `PolicyCache.prefill`.

    Args:
        model: the cache's model.
        cache, passes: the cache, which may have seen the beginning, and its own passes.
        input_ids: int64 `[B, P]`, left-padded where rows differ.
        attention_mask: `[B, P]`, 0 for padding.
        size: tokens per forward pass; None for one pass that leaves one token.
    """
    _check_size(size)
    check_ids(input_ids)
    if passes.engine.policy.traits.whole_prompt:
        raise UnsupportedError(
            f"prefill: policy {passes.engine.policy.name!r} lets tokens of the prompt look ahead and needs it in one "
            "piece; leave prefill out and give the whole prompt to model.generate()."
        )
    seen, length = passes.engine.columns, input_ids.shape[1]
    if length <= seen:
        raise CacheStateError(
            f"input_ids: the cache has already seen {seen} tokens and the prompt has {length}; pass the whole text."
        )
    if size is None:
        ends = range(max(length - 1, seen + 1), length)
    else:
        ends = range(length - ((length - seen - 1) // size) * size, length, size)
    passes.prompt_end = length
    for _ in _run(model, cache, input_ids, attention_mask, seen, ends):
        pass


@torch.no_grad()
def read_context(
    model: PreTrainedModel,
    cache: object,
    passes: Passes,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    size: int | None,
) -> Tensor:
    """Run a context through a cache's model to its end, compressing it; see `PolicyCache.read`."""
    _check_size(size)
    check_ids(input_ids)
    check_reads_contexts(passes.engine.policy, chunk=size)
    length = input_ids.shape[1]
    if passes.engine.columns or not length:
        raise CacheStateError(
            f"read: the cache has seen {passes.engine.columns} tokens and the context has {length}; read a context of "
            "at least one token with a new cache."
        )
    size = size or length
    ends = range(length - ((length - 1) // size) * size, length + 1, size)
    passes.prompt_end = length
    last = input_ids.new_empty(0)
    for logits in _run(model, cache, input_ids, attention_mask, 0, ends):
        passes.compact(fit=False)
        assert logits is not None, "a context is read for questions, which a model with a head answers"
        last = logits
    passes.compact()
    return last


def check_reads_contexts(policy: Policy, chunk: int | None = None) -> None:
    """Raise UnsupportedError if a policy cannot compress a context that has been read.

    Args:
        policy: the policy.
        chunk: tokens per forward pass; None for the whole context in one.
    """
    if policy.reserved(1) > policy.reserved():
        raise UnsupportedError(
            f"policy {policy.name!r} pins the prompt, which the context would be, so that nothing of it could go; "
            "write `protect: {prompt: false}` or choose another policy."
        )
    late = next((c for c in policy.components if "prefill" not in c.phases), None)
    if late is not None:
        raise UnsupportedError(
            f"policy {policy.name!r}: {named(late)} works while decoding only and cannot compress a context; "
            "choose another component."
        )
    declared = policy.prefill_chunk
    if declared is not None and chunk is not None and chunk > declared and policy.phase != "decode":
        raise UnsupportedError(
            f"chunk: policy {policy.name!r} compresses in chunks of {declared} tokens and not of {chunk}; write at "
            f"most {declared}, or load the policy with another prefill_chunk."
        )
    if chunk is not None and policy.traits.whole_prompt:
        raise UnsupportedError(
            f"chunk: policy {policy.name!r} lets tokens of the prompt look ahead and needs the context in one piece; "
            "leave chunks out."
        )


def _check_size(size: int | None) -> None:
    check_whole("chunk", size)
    if size is not None and size < 1:
        raise CacheStateError(f"chunk: {size} is not a chunk size; write at least 1.")


def _run(
    model: PreTrainedModel,
    cache: object,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    seen: int,
    ends: range,
) -> Iterator[Tensor | None]:
    """Feed the tokens from `seen` to each of `ends` in a pass; yield its last logits `[B, V]`, None without a head."""
    for end in ends:
        mask = None if attention_mask is None else attention_mask[:, :end]
        output = model(
            input_ids[:, seen:end], attention_mask=mask, position_ids=_positions(mask, seen, end),
            use_cache=True, logits_to_keep=1, **passing(cache, model.forward),
        )  # fmt: skip
        logits = getattr(output, "logits", None)
        yield None if logits is None else logits[:, -1]
        seen = end


def _positions(mask: Tensor | None, start: int, end: int) -> Tensor | None:
    """Return position ids `[B, end - start]` as generate() makes them from a mask."""
    if mask is None:
        return None
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, start:end]
