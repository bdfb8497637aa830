"""Generation in one call: chunked prefill, then ``model.generate``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.errors import SpecError, UnsupportedError
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf.cache import PolicyCache
from kvpolicy.runtimes.hf.given import Amount, check_ids, check_model
from kvpolicy.runtimes.hf.model_facts import image_tokens
from kvpolicy.runtimes.hf.naming import NAMES, passing
from kvpolicy.runtimes.hf.trial import refuse_implementation

if TYPE_CHECKING:
    from kvpolicy.spec import PolicySpec


def generate(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    policy: Policy | PolicySpec | str | Path | PolicyCache,
    *,
    budget: Amount | None = None,
    num_return_sequences: int = 1,
    num_beams: int = 1,
    **kwargs: Any,
) -> tuple[Any, PolicyCache]:
    """Generate under a policy, with the prompt in chunks of the policy's `prefill_chunk` where it has one.

    Args:
        model: a decoder of transformers.
        inputs: ``input_ids`` `[B, P]` and usually ``attention_mask`` `[B, P]`, as a tokenizer returns them.
        policy: a policy, specification, name or path; or a `PolicyCache` that holds earlier turns.
        budget: takes the place of the policy's own, as in `kvpolicy.load`.
        num_return_sequences: passed on to ``model.generate``.
        num_beams: passed on to ``model.generate``.
        **kwargs: passed on to ``model.generate``.

    Returns:
        What ``model.generate`` returns, and the cache. A cache made here is detached from the model; its numbers can
        still be read.

    Raises:
        UnsupportedError: the model cannot be served, or did not use the cache; another cache is asked for.
        SpecError: the policy or its budget is not valid, or a `PolicyCache` is given another one.
        CacheStateError: ``input_ids`` are no tokens, or do not continue what the cache has seen.
        BudgetError, ComponentError: from the policy.
    """
    check_model(model, "generate(model, inputs, policy)")
    if not isinstance(inputs, Mapping):
        raise UnsupportedError(
            f"inputs: {type(inputs).__name__} is no mapping; give what the tokenizer returns with "
            'return_tensors="pt", or {"input_ids": ids}.'
        )
    if "input_ids" in inputs:
        check_ids(inputs["input_ids"])
    if isinstance(policy, PolicyCache) and budget is not None:
        raise SpecError("budget: a PolicyCache has a policy with one already; leave it out, or make another cache.")
    refuse_implementation(kwargs.get("cache_implementation"), "generate")
    for name in NAMES:
        if name in kwargs:
            other = type(kwargs[name]).__name__
            raise UnsupportedError(f"{name}: a {other} follows no policy; give a PolicyCache as `policy` instead.")
    cache = policy if isinstance(policy, PolicyCache) else PolicyCache(policy, model, budget=budget)
    more = max(num_return_sequences, num_beams)
    repeated = {
        name: value.repeat_interleave(more, 0) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    ids = repeated.get("input_ids")
    if "modality" in cache.policy.needs and ids is not None and not cache.get_seq_length():
        cache.set_modality(torch.isin(ids, torch.tensor(image_tokens(model), dtype=ids.dtype, device=ids.device)))
    seen = cache.get_seq_length()
    try:
        if set(inputs) <= {"input_ids", "attention_mask", "token_type_ids"}:
            # generate() repeats the prompt for beams and samples only after the cache has been filled.
            cache.prefill_chunks(repeated["input_ids"], repeated.get("attention_mask"))
        output = model.generate(
            **inputs, **passing(cache), num_return_sequences=num_return_sequences, num_beams=num_beams, **kwargs
        )
        cache.check()
        if cache.get_seq_length() == seen:
            raise UnsupportedError(
                f"{type(model).__name__}.generate() did not use the cache that it was given; call a decoder that hands "
                "past_key_values on to its layers."
            )
    finally:
        if cache is not policy:
            cache.close()
    return output, cache
