"""Answers behind a cache that has read a context: what `ContextCache` and its conversations share."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor

from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf.cache import PolicyCache
from kvpolicy.runtimes.hf.given import check_whole
from kvpolicy.runtimes.hf.naming import NAMES, passing
from kvpolicy.runtimes.hf.positions import positions_left
from kvpolicy.runtimes.hf.stats import CacheStats

MOST_NEW_TOKENS: Final = 256
"""Tokens of an answer where nobody says how many."""

_GIVEN: Final = (*NAMES, "cache_implementation", "use_cache", "inputs", "input_ids", "attention_mask", "max_length")


@dataclass(frozen=True)
class Reply:
    """An answer to one question.

    Attributes:
        text: the answer, without special tokens and without the prefix that was given.
        tokens: its token ids, with the one that ended it.
        prompt_tokens: tokens of context and question.
        stats: what the cache of this answer, and of those that ran together with it, held when it was complete; the
            peaks count the context, too.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    stats: CacheStats

    @classmethod
    def of(cls, tokenizer: Any, answer: Sequence[int], prompt_tokens: int, stats: CacheStats) -> Self:
        """Return the reply that an answer's tokens make."""
        return cls(tokenizer.decode(answer, skip_special_tokens=True), tuple(answer), prompt_tokens, stats)


def check_generation(generation: Mapping[str, Any], wanted: int | None) -> int | None:
    """Return the most tokens of an answer that a caller asks for, as an argument or in a configuration.

    Raises:
        UnsupportedError: an argument of ``model.generate`` is one that the context cache gives itself.
    """
    for name in _GIVEN:
        if name in generation:
            hint = "write max_new_tokens" if name == "max_length" else "leave it out"
            raise UnsupportedError(f"{name}: comes from the context cache, which knows what has been read; {hint}.")
    return wanted if wanted is not None else getattr(generation.get("generation_config"), "max_new_tokens", None)


def setting(model: Any, generation: Mapping[str, Any], name: str) -> Any:
    """Return what ``model.generate`` takes for one of its settings: the argument, or what a configuration says."""
    if generation.get(name) is not None:
        return generation[name]
    return getattr(generation.get("generation_config") or model.generation_config, name, None)


def answers_each(model: Any, generation: Mapping[str, Any]) -> int:
    """Return how many rows ``model.generate`` makes of each: samples, or beams."""
    return max(setting(model, generation, name) or 1 for name in ("num_return_sequences", "num_beams"))


def new_tokens(
    model: Any, policy: Policy, prompt: int, wanted: int | None, what: str, *, option: str = "max_new_tokens"
) -> int:
    """Return how many tokens an answer may have.

    Args:
        model: a decoder of transformers.
        policy: what is done with its cache.
        prompt: tokens of everything in front of the answer.
        wanted: as the caller says.
        what: what errors about the text begin with.
        option: what errors about `wanted` begin with.

    Raises:
        CacheStateError: the text, or so long an answer, does not fit the model's positions; or `wanted` is no number
            of tokens.
    """
    check_whole(option, wanted)
    if wanted is not None and wanted < 1:
        raise CacheStateError(f"{option}: {wanted} tokens make no answer; write at least 1.")
    room = positions_left(model, policy, prompt, what)
    if room is None:
        return MOST_NEW_TOKENS if wanted is None else wanted
    if wanted is not None and wanted > room:
        raise CacheStateError(
            f"{option}: behind {prompt:,} tokens of text there is room for {room:,} of the {wanted:,} that are asked "
            f"for, for the model has {prompt + room:,} positions; write fewer."
        )
    return min(MOST_NEW_TOKENS, room) if wanted is None else wanted


def generate_behind(
    cache: PolicyCache,
    tokenizer: Any,
    past: Tensor,
    following: Sequence[Sequence[int]],
    tokens: int,
    generation: Mapping[str, Any],
) -> list[list[int]]:
    """Generate behind what a cache has read; return the answers' tokens, those of one row after the other.

    What follows counts as decoding: it is not part of what was compressed, and the policy goes on as it says.

    Args:
        cache: the cache; it has seen some or all of `past`.
        tokenizer: says which token is padding.
        past: int64 `[B, P]`, what has been read, -1 for padding.
        following: token ids of each row that come behind it.
        tokens: most new ones.
        generation: arguments of ``model.generate``; for several samples or beams the cache's rows are repeated.
    """
    model: Any = cache.model
    width = max(map(len, following))
    ends = end_tokens(model, generation)
    pad = setting(model, generation, "pad_token_id")
    pad = next((id_ for id_ in (pad, tokenizer.pad_token_id, *sorted(ends)) if id_ is not None), 0)
    behind = [[-1] * (width - len(row)) + list(row) for row in following]
    whole = torch.cat([past, torch.tensor(behind, device=past.device)], 1)
    if (more := answers_each(model, generation)) > 1:
        cache.batch_repeat_interleave(more)
    cache.expect("decode")
    options, ours = dict(generation), {"max_new_tokens": tokens, "pad_token_id": pad}
    if (config := options.get("generation_config")) is None:
        options |= ours
    else:  # beside which transformers takes no other settings
        options["generation_config"] = copy.deepcopy(config)
        options["generation_config"].update(**ours)
    output = model.generate(whole.clamp(min=0), attention_mask=(whole >= 0).long(), **passing(cache), **options)
    sequences: Tensor = output if isinstance(output, Tensor) else output.sequences
    cache.check()
    return [_until(row, ends) for row in sequences[:, whole.shape[1] :].tolist()]


def end_tokens(model: Any, generation: Mapping[str, Any]) -> frozenset[int]:
    """Return the tokens that end an answer, as ``model.generate`` takes them."""
    ends = setting(model, generation, "eos_token_id")
    listed = ends.tolist() if isinstance(ends, Tensor) else ends
    return frozenset(listed if isinstance(listed, list | tuple) else () if listed is None else (listed,))


def _until(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """Return tokens up to the first that ends an answer; behind it there is padding."""
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]
