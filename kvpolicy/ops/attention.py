"""Attention of some queries over the cache, as weights."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor

from kvpolicy.types import Keys, Mask, Positions, Queries, Weights


def attention_weights(
    queries: Queries,
    query_positions: Int32[Tensor, "B Q"],
    query_valid: Bool[Tensor, "B Q"],
    keys: Keys,
    positions: Positions,
    valid: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    attention_sinks: Float[Tensor, "H G"] | None = None,
) -> Weights:
    """Softmax weights of each query over the slots it can see: valid ones at its own position or before.

    Args:
        queries: `[B, H, G, Q, D]`, after RoPE, any float dtype.
        query_positions: int32 `[B, Q]`, original positions, in any order.
        query_valid: bool `[B, Q]`.
        keys: `[B, H, N, D]`, after RoPE, any float dtype.
        positions: int32 `[B, H, N]`, original positions.
        valid: bool `[B, H, N]`.
        scale: factor of the logits.
        softcap: `c` in `c * tanh(logit / c)`, applied before the mask.
        attention_sinks: `[H, G]` logits that take part in each softmax and get no weight in the result.

    Returns:
        fp32 `[B, H, G, Q, N]`; 0 for slots out of sight and for queries that are not valid.
    """
    logits = attention_logits(queries, keys, scale, softcap)
    visible = causal_mask(query_positions, query_valid, positions, valid).unsqueeze(2)
    sinks = None if attention_sinks is None else attention_sinks[None, :, :, None]
    return masked_softmax(logits, visible, sinks)


def attention_logits(queries: Queries, keys: Keys, scale: float, softcap: float | None) -> Float32[Tensor, "B H G Q N"]:
    """Scaled and soft-capped logits of `[B, H, G, Q, D]` queries over `[B, H, N, D]` keys, in fp32, unmasked."""
    batch, heads, group, count, dim = queries.shape
    flat = queries.float().reshape(batch, heads, group * count, dim)
    logits = torch.matmul(flat * scale, keys.float().transpose(-1, -2))
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits.reshape(batch, heads, group, count, keys.shape[2])


def causal_mask(
    query_positions: Int32[Tensor, "B Q"], query_valid: Bool[Tensor, "B Q"], positions: Positions, valid: Mask
) -> Bool[Tensor, "B H Q N"]:
    """Which slots each query can see: bool `[B, H, Q, N]`."""
    reached = positions.unsqueeze(2) <= query_positions[:, None, :, None]
    return reached & valid.unsqueeze(2) & query_valid[:, None, :, None]


def masked_softmax(
    logits: Float32[Tensor, "*dims N"], mask: Bool[Tensor, "*dims N"], sinks: Float[Tensor, "*rows"] | None = None
) -> Float32[Tensor, "*dims N"]:
    """Softmax over the last axis among the slots of `mask`.

    Args:
        logits: fp32 `[..., N]`; whatever stands outside the mask is ignored.
        mask: bool, broadcastable to `logits`.
        sinks: logits, broadcastable to `[...]`, that join each denominator.

    Returns:
        fp32 `[..., N]`, 0 outside the mask; a row with an empty mask is all 0.
    """
    # The lowest finite number instead of -inf: an empty row stays finite and is zeroed below.
    masked = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if sinks is not None:
        column = sinks.to(logits.dtype).expand(logits.shape[:-1]).unsqueeze(-1)
        masked = torch.cat([masked, column], dim=-1)
    weights = torch.softmax(masked, dim=-1)
    return weights[..., : logits.shape[-1]].masked_fill(~mask, 0.0)
