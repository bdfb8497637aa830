"""What scorers share that look through the rotary embedding."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.view import CacheView, Rope, lacking
from kvpolicy.types import Keys


class NeedsRope:
    """`needs` of a scorer that un-rotates keys only when its parameter `rope` says so."""

    def __get__(self, scorer: Any, owner: type[Any]) -> frozenset[str]:
        return frozenset({"rope"}) if scorer is not None and scorer.rope == "pre" else frozenset()


def rope_of(view: CacheView, who: str) -> Rope:
    """Return the rotary embedding of the view; raises UnsupportedError, naming the component, when it has none."""
    if view.rope is None:
        raise lacking(who, "the rotary embedding", "`rope`")
    return view.rope


def unrotated_keys(view: CacheView, who: str) -> Float32[Tensor, "B H N D"]:
    """Return the keys without their rotary embedding, in fp32: half-precision ones would be rounded a second time."""
    at = view.positions if view.rope_positions is None else view.rope_positions
    return ops.rotate(view.keys.float(), rope_of(view, who), -at)


def compared_keys(view: CacheView, rope: Literal["pre", "post"], who: str) -> Keys:
    """Return the keys that a scorer with the parameter `rope` compares: un-rotated (`pre`) or as cached (`post`)."""
    return unrotated_keys(view, f"{who} with `rope: pre`") if rope == "pre" else view.keys


def next_position(view: CacheView) -> Int64[Tensor, "B H"]:
    """Rotary position of each row's next token, as each head's entries say it.

    It is the number of tokens seen, less what the row's new tokens are turned back by since keys were re-rotated. Where
    the view does not say that, the newest entry does; every head asks its own, for a rank may hold only some of them.
    """
    seen = view.seen.to(device=view.device, dtype=torch.int64).unsqueeze(1).expand(view.shape[:2])
    if view.turned_back is not None:
        return seen - view.turned_back.to(device=view.device, dtype=torch.int64).unsqueeze(1)
    if view.rope_positions is None:
        return seen
    positions = view.positions.to(torch.int64).masked_fill(~view.valid, -1)
    newest = positions.argmax(dim=2, keepdim=True)
    shift = (positions.gather(2, newest) - view.rope_positions.gather(2, newest)).squeeze(2)
    return torch.where(view.valid.any(dim=2), seen - shift, seen)
