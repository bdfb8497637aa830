"""What scorers share that look through the rotary embedding."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.view import CacheView, Rope
from kvpolicy.errors import UnsupportedError
from kvpolicy.types import Keys


class NeedsRope:
    """`needs` of a scorer that un-rotates keys only when its parameter `rope` says so."""

    def __get__(self, scorer: Any, owner: type[Any]) -> frozenset[str]:
        return frozenset({"rope"}) if scorer is not None and scorer.rope == "pre" else frozenset()


def rope_of(view: CacheView, who: str) -> Rope:
    """Return the rotary embedding of the view; raises UnsupportedError, naming the component, when it has none."""
    if view.rope is None:
        raise UnsupportedError(f"{who} needs the rotary embedding and the view holds none.")
    return view.rope


def unrotated_keys(view: CacheView, who: str) -> Float32[Tensor, "B H N D"]:
    """Return the keys without their rotary embedding, in fp32: half-precision ones would be rounded a second time."""
    at = view.positions if view.rope_positions is None else view.rope_positions
    return ops.rotate(view.keys.float(), rope_of(view, who), -at)


def compared_keys(view: CacheView, rope: Literal["pre", "post"], who: str) -> Keys:
    """Return the keys that a scorer with the parameter `rope` compares: un-rotated (`pre`) or as cached (`post`)."""
    return unrotated_keys(view, f"{who} with `rope: pre`") if rope == "pre" else view.keys


def next_position(view: CacheView) -> Int64[Tensor, " B"]:
    """Rotary position of each row's next token.

    It is the number of tokens seen, less what the row's new tokens are turned back by since keys were re-rotated; the
    newest entry carries that difference.
    """
    seen = view.seen.to(device=view.device, dtype=torch.int64)
    if view.rope_positions is None:
        return seen
    positions = view.positions.to(torch.int64).masked_fill(~view.valid, -1).flatten(1)
    newest = positions.argmax(dim=1, keepdim=True)
    shift = (positions.gather(1, newest) - view.rope_positions.flatten(1).gather(1, newest)).squeeze(1)
    return torch.where(view.valid.flatten(1).any(dim=1), seen - shift, seen)
