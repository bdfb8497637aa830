"""Importance from an observation window: what the last queries attend to (SnapKV, R-KV and their relatives)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor
from torch.nn import functional

from kvpolicy.ops.attention import attention_logits, causal_mask, masked_softmax
from kvpolicy.ops.dispatch import dispatched
from kvpolicy.ops.packing import pack, unpack
from kvpolicy.types import Keys, Mask, Positions, Queries, Scores

SmoothKind = Literal["max", "mean", "mean_zero_padded"]

_NO_QUERY = torch.iinfo(torch.int32).max
_TINY = torch.finfo(torch.float32).tiny
_LOGITS = 1 << 17  # logits of all query heads that are held at a time


@dispatched
def window_importance(
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
    group: Literal["max", "mean"] = "max",
    group_stage: Literal["logits", "weights"] = "logits",
    softmax_over: Literal["candidates", "row"] = "candidates",
    smooth: int = 7,
    smooth_kind: SmoothKind = "max",
    smooth_stage: Literal["mean", "query"] = "mean",
) -> Scores:
    """Mean attention of the observed queries to every candidate, smoothed along the sequence.

    Candidates are the valid slots older than the oldest valid query. Valid slots of the window itself get the largest
    candidate score of their head: they are the newest, and policies protect them anyway.

    Args:
        queries: `[B, H, G, Q, D]`, after RoPE, in any order, any float dtype.
        query_positions: int32 `[B, Q]`, original positions.
        query_valid: bool `[B, Q]`; the others take no part.
        keys: `[B, H, N, D]`, after RoPE, any float dtype.
        positions: int32 `[B, H, N]`, original positions, increasing over the valid slots.
        valid: bool `[B, H, N]`.
        scale: factor of the logits.
        softcap: logit soft-cap of the model, applied before everything else.
        attention_sinks: `[H, G]` sink logits; they join the denominators, reduced like the logits where those are.
        group: how the `G` query heads of a KV head become one.
        group_stage: ``logits`` reduces before the softmax (R-KV eq. 3), ``weights`` after it (SnapKV with GQA).
        softmax_over: ``candidates`` leaves the window out of the softmax (R-KV appendix A.2), ``row`` normalises over
            all a query can see (SnapKV).
        smooth: window size, 1 for none. Odd sizes are centred; an even size `2W` covers `[i-W, i+W-1]` (R-KV eq. 4).
        smooth_kind: as in `smooth_scores`.
        smooth_stage: ``mean`` smooths the mean over queries (R-KV's code), ``query`` each query's row (R-KV eq. 4).

    Returns:
        fp32 `[B, H, N]`, higher = keep; 0 for invalid slots, and everywhere in a row without candidates or queries.
    """
    if queries.shape[3] == 0 or keys.shape[2] == 0:
        return torch.zeros(valid.shape, dtype=torch.float32, device=keys.device)
    oldest = query_positions.masked_fill(~query_valid, _NO_QUERY).amin(dim=-1)
    candidates = valid & (positions < oldest[:, None, None])
    if softmax_over == "candidates":
        visible = candidates.unsqueeze(2) & query_valid[:, None, :, None]
    else:
        visible = causal_mask(query_positions, query_valid, positions, valid)

    if group_stage == "logits":
        sinks = None if attention_sinks is None else _over_group(attention_sinks.float(), group, 1)[None, :, None]
        pooled = torch.empty(visible.shape[:3] + keys.shape[2:3], dtype=torch.float32, device=keys.device)
        for part in _parts(queries, keys):
            pooled[..., part] = _over_group(attention_logits(queries, keys[:, :, part], scale, softcap), group, 2)
        rows = masked_softmax(pooled, visible, sinks)
    else:
        sinks = None if attention_sinks is None else attention_sinks[None, :, :, None].float()
        rows = _grouped_weights(queries, keys, visible, sinks, scale, softcap, group)

    rows = rows.masked_fill(~candidates.unsqueeze(2), 0.0)
    if smooth_stage == "query":
        rows = smooth_scores(rows, candidates.unsqueeze(2), smooth, smooth_kind)
    # Queries that are not valid hold zeros, so the sum needs no mask.
    scores = rows.sum(dim=2) / query_valid.sum(dim=-1).clamp(min=1)[:, None, None]
    if smooth_stage == "mean":
        scores = smooth_scores(scores, candidates, smooth, smooth_kind)
    return torch.where(valid & ~candidates, scores.amax(dim=-1, keepdim=True), scores)


def _parts(queries: Queries, keys: Keys) -> list[slice]:
    """Cut the slots so that the logits of all query heads over a part stay small."""
    size = max(64, _LOGITS // max(queries.shape[:4].numel(), 1))
    return [slice(start, start + size) for start in range(0, keys.shape[2], size)]


def _grouped_weights(
    queries: Queries,
    keys: Keys,
    visible: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    group: Literal["max", "mean"],
) -> Float32[Tensor, "B H Q N"]:
    """Softmax weights per query head, reduced over the group: two passes over the keys, no weights of all heads."""
    lowest = torch.finfo(torch.float32).min
    most = torch.full(queries.shape[:4], lowest, device=keys.device)
    total = torch.zeros_like(most)
    if sinks is not None:
        most, total = sinks.expand_as(most).contiguous(), torch.ones_like(most)

    def logits(part: slice) -> Tensor:
        return attention_logits(queries, keys[:, :, part], scale, softcap).masked_fill_(
            ~visible[:, :, None, :, part], -torch.inf
        )

    for part in _parts(queries, keys):
        some = logits(part)
        higher = torch.maximum(most, some.amax(-1))
        total = total * torch.exp(most - higher) + torch.exp(some - higher.unsqueeze(-1)).sum(-1)
        most = higher
    rows = torch.empty(visible.shape[:3] + keys.shape[2:3], dtype=torch.float32, device=keys.device)
    for part in _parts(queries, keys):
        weights = torch.exp(logits(part) - most.unsqueeze(-1)) / total.clamp(min=_TINY).unsqueeze(-1)
        rows[..., part] = _over_group(weights, group, 2)
    return rows


def smooth_scores(
    scores: Float32[Tensor, "*dims N"], candidates: Bool[Tensor, "*dims N"], size: int, kind: SmoothKind
) -> Float32[Tensor, "*dims N"]:
    """Pool non-negative scores over neighbouring candidates; other slots are skipped, not pooled over.

    Args:
        scores: fp32 `[..., N]`.
        candidates: bool, broadcastable to `scores`.
        size: slots per window; `[i - size // 2, i + (size - 1) // 2]` around the `i`-th candidate.
        kind: ``max``; ``mean`` over the candidates that the window really holds; ``mean_zero_padded`` divides by the
            whole window, so that the first and last candidates lose (what `avg_pool1d` does).

    Returns:
        fp32 `[..., N]`, 0 outside the candidates.
    """
    count = scores.shape[-1]
    if size == 1 or count == 0:
        return scores.masked_fill(~candidates, 0.0)
    fill = float("-inf") if kind == "max" else 0.0
    packed = pack(scores, candidates, fill)
    padded = functional.pad(packed.reshape(-1, 1, count), (size // 2, (size - 1) // 2), value=fill)
    if kind == "max":
        pooled = functional.max_pool1d(padded, size, stride=1)
    else:
        pooled = functional.avg_pool1d(padded, size, stride=1)
    pooled = pooled.reshape(scores.shape)
    if kind == "mean":
        held = torch.arange(count, device=scores.device) < candidates.sum(dim=-1, keepdim=True)
        held = functional.pad(held.float().reshape(-1, 1, count), (size // 2, (size - 1) // 2))
        share = functional.avg_pool1d(held, size, stride=1).reshape(candidates.shape)
        pooled = pooled / share.clamp(min=0.5 / size)
    return unpack(pooled, candidates)


def _over_group(tensor: Tensor, group: Literal["max", "mean"], dim: int) -> Tensor:
    return tensor.amax(dim=dim) if group == "max" else tensor.mean(dim=dim)
