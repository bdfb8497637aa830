"""Scores by their literal keys x keys form in fp32: what is compared with, in time, memory and result."""

from __future__ import annotations

import torch
from torch import Tensor


def released_redundancy(keys: Tensor, threshold: float = 0.5) -> Tensor:
    """Redundancy `[H, N]` of keys `[H, N, D]` by the steps of R-KV's released code, in fp32.

    All cosines; the diagonal cleared head by head; each row's newest column above the threshold, looked up as the
    largest of masked int64 column numbers (column 0 if there is none), cleared; the means of the columns; a softmax.
    """
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
    cosine = unit @ unit.transpose(-1, -2)
    for head in cosine:
        head.fill_diagonal_(0.0)
    similar = cosine > threshold
    numbers = torch.arange(keys.shape[1], device=keys.device)
    newest = torch.where(similar, numbers, torch.zeros_like(similar, dtype=torch.int64)).max(dim=-1).values
    heads = torch.arange(keys.shape[0], device=keys.device).unsqueeze(-1)
    cosine[heads, numbers.unsqueeze(0), newest] = 0.0
    scores: Tensor = cosine.mean(dim=1).softmax(dim=-1)
    return scores


def density(keys: Tensor, bandwidth: float) -> Tensor:
    """Kernel density `[H, N]` of keys `[H, N, D]`, as `kvpolicy.ops.key_density` where all keys count alike."""
    unit = torch.nn.functional.normalize(keys, dim=-1)
    weight = ((unit @ unit.transpose(-1, -2) - 1) / bandwidth).exp_()
    weight.diagonal(dim1=-2, dim2=-1).zero_()
    return weight.mean(-1)
