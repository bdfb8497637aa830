"""Whether a text fits the positions that a model was made for: beyond them it answers, but in words of no meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from transformers import PreTrainedModel

from kvpolicy.errors import CacheStateError
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.shapes import positions_of

_CHARACTERS: Final = 16  # of a token, at most, in all but odd texts
_JOINED: Final = 64  # tokens at the end of a text that is cut anywhere may be others than in the whole


def most_positions(model: PreTrainedModel, policy: Policy) -> int | None:
    """Return how many positions a text may have under a policy; None where the configuration sets no limit to it.

    A policy that re-rotates gives kept entries new positions, so that there is none.
    """
    return None if policy.traits.re_rotates else positions_of(model.config.get_text_config(decoder=True))


def positions_left(model: PreTrainedModel, policy: Policy, tokens: int, what: str, *, least: int = 1) -> int | None:
    """Return how many positions are left behind so many tokens; None where there is no limit.

    Args:
        model: a decoder of transformers.
        policy: what is done with its cache.
        tokens: of everything that is read before.
        what: what an error begins with.
        least: positions that have to be left: 1 for a token that is generated, 0 for a text that is only read.

    Raises:
        CacheStateError: fewer are.
    """
    limit = most_positions(model, policy)
    if limit is not None and limit - tokens < least:
        raise _too_long(what, f"{tokens:,}", limit)
    return None if limit is None else limit - tokens


def check_length(model: PreTrainedModel, policies: Sequence[Policy], tokenizer: Any, text: str, what: str) -> None:
    """Refuse a text of far more tokens than a model has positions by its beginning, before all of it is made tokens.

    A tokenizer takes some 500 bytes for each, so that a file of 60 MB would take what a small machine has.

    Args:
        model: a decoder of transformers.
        policies: each of which reads it.
        tokenizer: one of transformers.
        text: what is to be read.
        what: what an error begins with.

    Raises:
        CacheStateError: it is longer. A text that is a little too long passes: `positions_left` counts.
    """
    most = min(filter(None, (most_positions(model, policy) for policy in policies)), default=0)
    size = _CHARACTERS * most
    while most and size < len(text):
        if len(tokenizer(text[:size], add_special_tokens=False)["input_ids"]) > most + _JOINED:
            raise _too_long(what, f"more than {most:,}", most)
        size *= 2


def _too_long(what: str, tokens: str, limit: int) -> CacheStateError:
    return CacheStateError(
        f"{what}: makes a text of {tokens} tokens, and the model has {limit:,} positions; give a shorter one, or use a "
        "policy that re-rotates what it keeps (`post: [rerotate]`)."
    )
