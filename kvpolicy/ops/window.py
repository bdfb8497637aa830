"""Importance from an observation window: what the last queries attend to (SnapKV, R-KV and their relatives)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor
from torch.nn import functional

from kvpolicy.ops.attention import attention_logits, causal_mask
from kvpolicy.ops.dispatch import dispatched
from kvpolicy.ops.packing import pack, unpack
from kvpolicy.types import Keys, Mask, Positions, Queries, Scores

SmoothKind = Literal["max", "mean", "mean_zero_padded"]

_NO_QUERY = torch.iinfo(torch.int32).max
# Logits that are held at a time: a CPU keeps them in a core's cache; elsewhere fewer launches count.
_LOGITS = {"cpu": 1 << 18}
_LOGITS_ELSEWHERE = 1 << 24


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
    scores = torch.zeros(valid.shape, dtype=torch.float32, device=keys.device)
    if queries.shape[3] == 0:
        return scores
    oldest = query_positions.masked_fill(~query_valid, _NO_QUERY).amin(dim=-1)
    candidates = valid & (positions < oldest[:, None, None])
    number = query_valid.sum(dim=-1).clamp(min=1)[:, None, None]
    for rows, heads in _pieces(queries, keys):
        at = (rows, heads)
        asked, chosen = query_valid[rows, None, :, None], candidates[at].unsqueeze(2)
        counted = chosen & asked
        seen = counted
        if softmax_over == "row":
            seen = causal_mask(query_positions[rows], query_valid[rows], positions[at], valid[at])
        sinks = None if attention_sinks is None else attention_sinks[heads].float()[None, :, :, None]
        logits = attention_logits(queries[at], keys[at], scale, softcap)
        if group_stage == "logits":
            logits = _over_group(logits, group)
            sinks = None if sinks is None else _over_group(sinks, group)
            weights = _softmax(logits, seen, sinks)
        else:
            weights = _over_group(_softmax(logits, seen.unsqueeze(2), sinks), group)
        weights = weights.masked_fill_(~counted, 0.0)
        if smooth_stage == "query":
            weights = smooth_scores(weights, chosen, smooth, smooth_kind)
        mean = weights.sum(dim=2) / number[rows]
        scores[at] = smooth_scores(mean, candidates[at], smooth, smooth_kind) if smooth_stage == "mean" else mean
    return torch.where(valid & ~candidates, scores.amax(dim=-1, keepdim=True), scores) if keys.shape[2] else scores


def _pieces(queries: Queries, keys: Keys) -> Iterator[tuple[slice, slice]]:
    """Cut rows and heads so that the logits of all query heads of a piece stay small; a head is never cut."""
    rows, heads, group, count = queries.shape[:4]
    each = max(1, _LOGITS.get(keys.device.type, _LOGITS_ELSEWHERE) // max(group * count * keys.shape[2], 1))
    for row in range(0, rows, max(1, each // max(heads, 1))):
        for head in range(0, heads, each):
            yield slice(row, row + max(1, each // heads)), slice(head, head + each)


def _softmax(logits: Tensor, seen: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax in place over the slots of `seen`; elsewhere, and where nothing is seen, any finite number."""
    # The lowest finite number instead of -inf: where nothing is seen, no NaN comes out.
    logits.masked_fill_(~seen, torch.finfo(torch.float32).min)
    if sinks is None:
        return torch.softmax(logits, dim=-1)
    return torch.softmax(torch.cat([logits, sinks.expand(logits.shape[:-1]).unsqueeze(-1)], dim=-1), dim=-1)[..., :-1]


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


def _over_group(tensor: Tensor, group: Literal["max", "mean"]) -> Tensor:
    return tensor.amax(dim=2) if group == "max" else tensor.mean(dim=2)
