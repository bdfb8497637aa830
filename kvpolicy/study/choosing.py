"""The next token of each row: greedy, or sampled with noise that depends on (seed, problem, step) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kvpolicy.errors import KVPolicyError
from kvpolicy.ops.noise import counter_uniform
from kvpolicy.study.sampling import Sampling


def row_key(digest: str) -> int:
    """Return 32 bits that stand for a problem in the noise."""
    return int.from_bytes(hashlib.sha256(digest.encode()).digest()[:4], "big")


def require_finite(numbers: Tensor) -> None:
    """Raise KVPolicyError unless numbers that were made of a model's logits are finite; reads the device."""
    if not bool(torch.isfinite(numbers).all()):
        raise KVPolicyError("the model's logits are not finite; use another dtype, or look for a damaged checkpoint.")


def choose(
    logits: Float[Tensor, "B V"], sampling: Sampling, seeds: Sequence[int], keys: Sequence[int], steps: Sequence[int]
) -> Tensor:
    """Return one token per row, int64 `[B]`.

    A row draws the same token whatever else is in its batch: the noise is a hash, not a generator's next number.

    Args:
        logits: `[B, V]`, any float dtype.
        sampling: temperature and top_p.
        seeds: seed of each row.
        keys: `row_key` of each row's problem.
        steps: how many tokens each row has generated.

    Raises:
        KVPolicyError: a row's logits are not finite.
    """
    best, greedy = logits.max(-1)
    require_finite(best)
    if sampling.greedy:
        return greedy
    words = [torch.tensor(list(values), dtype=torch.int64, device=logits.device) for values in (seeds, keys, steps)]
    # Two words make 48 bits, so that rare tokens keep their probability.
    high, low = (counter_uniform(0, layer, words[0], words[1], words[2]).double() for layer in (0, 1))
    noise = high + low * 2.0**-24
    ordered, tokens = (logits.double() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
    reached = ordered.cumsum(-1)
    # noise < 1, so some token exceeds noise * mass, and the first to do so is never one of probability 0.
    pick = (reached <= (noise * reached[:, -1])[:, None]).sum(-1)
    return tokens.gather(-1, pick[:, None])[:, 0]
