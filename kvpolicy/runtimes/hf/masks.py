"""Masks that a model makes by a function of its own: images whose tokens see each other, prefixes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import eager_mask, sdpa_mask

from kvpolicy.runtimes.hf.handover import MaskFunction


def beyond_causal(build: MaskFunction, kwargs: dict[str, Any], seen: int) -> Tensor | None:
    """Return the mask that a model asks for, or None if its new tokens see what precedes them and nothing else.

    A function may treat tokens of earlier passes in its own way (an image that the cache has seen): what counts is what
    the tokens of this pass see.

    Args:
        build: the mask function of the model's own implementation.
        kwargs: what transformers calls it with; the padding in it is left out.
        seen: columns before this pass.

    Returns:
        `[B, 1, q, seen + q]`, bool (True = visible) or what eager attention adds to its logits.
    """
    honest = build if build is eager_mask else sdpa_mask  # flash attention leaves out what a model's function says
    mask = honest(**{**kwargs, "attention_mask": None})
    if mask is None:
        return None
    visible = mask if mask.dtype == torch.bool else mask == 0
    causal = torch.ones(visible.shape[-2:], dtype=torch.bool, device=mask.device).tril(seen)
    return None if bool((visible == causal).all()) else mask
