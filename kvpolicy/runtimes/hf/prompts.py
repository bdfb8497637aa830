"""A prompt that is fed to a cache in pieces, before `generate` or instead of it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf.naming import passing
from kvpolicy.runtimes.hf.passes import Passes


@torch.no_grad()
def feed_prompt(
    model: PreTrainedModel,
    cache: Cache,
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
    if size is not None and size < 1:
        raise CacheStateError(f"chunk: {size} is not a chunk size; write at least 1.")
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
    for end in ends:
        mask = None if attention_mask is None else attention_mask[:, :end]
        model(
            input_ids[:, seen:end], attention_mask=mask, position_ids=_positions(mask, seen, end),
            use_cache=True, logits_to_keep=1, **passing(cache, model.forward),
        )  # fmt: skip
        seen = end


def _positions(mask: Tensor | None, start: int, end: int) -> Tensor | None:
    """Return position ids `[B, end - start]` as generate() makes them from a mask."""
    if mask is None:
        return None
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, start:end]
