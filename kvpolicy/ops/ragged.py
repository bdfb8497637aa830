"""Attention over a cache whose heads hold different numbers of entries: flat blocks, and a dense tail of new tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kvpolicy.ops.dispatch import dispatched


class Blocks(NamedTuple):
    """One layer's entries, head after head, in blocks of `P` slots of which only a head's last may have free ones.

    Attributes:
        keys: `[M, P, D]`, after RoPE, in the cache's dtype.
        values: `[M, P, Dv]`.
        owner: int64 `[M]`, ascending: `row * H + head` that the block belongs to.
        filled: int64 `[M]`, how many of the block's slots hold entries, at least 1; the others are finite leftovers.
    """

    keys: Float[Tensor, "M P D"]
    values: Float[Tensor, "M P Dv"]
    owner: Int64[Tensor, " M"]
    filled: Int64[Tensor, " M"]


@dispatched
def ragged_attention(
    queries: Float[Tensor, "B Hq q D"],
    base: Blocks,
    tail_keys: Float[Tensor, "B H T D"],
    tail_values: Float[Tensor, "B H T Dv"],
    visible: Bool[Tensor, "rows heads q T"] | None,
    *,
    scale: float,
    softcap: float | None = None,
    attention_sinks: Float[Tensor, "H G"] | None = None,
) -> Float[Tensor, "B Hq q Dv"]:
    """Exact attention of queries over a ragged base, all of which they see, and a dense tail.

    Each block is a piece of work of its own (split-K); the pieces of a head are combined by their maxima and sums, so
    that no head is padded to the length of another.

    Args:
        queries: `[B, Hq, q, D]`, rotated as the keys are; query heads `h*G ... h*G + G-1` read KV head `h`.
        base: entries that are older than every query.
        tail_keys: `[B, H, T, D]`, `T >= 1`.
        tail_values: `[B, H, T, Dv]`.
        visible: bool `[B or 1, H or 1, q, T]`, which slots of the tail each query sees; None for all.
        scale: factor of the logits.
        softcap: `c` in `c * tanh(logit / c)`.
        attention_sinks: `[H, G]` logits that take part in each softmax.

    Returns:
        `[B, Hq, q, Dv]` in the dtype of the queries; logits, softmax and sums are fp32 (fp64 for fp64 queries).
    """
    batch, query_heads, count, dim = queries.shape
    heads = tail_keys.shape[1]
    group = query_heads // heads
    # Before the products, not after them: those of fp16 overflow, and bf16 would round each logit to 3 digits.
    wide = torch.promote_types(queries.dtype, torch.float32)
    flat = queries.to(wide).reshape(batch * heads, group * count, dim)
    tail = tail_keys.to(wide).reshape(batch * heads, *tail_keys.shape[2:])
    recent = _capped(torch.bmm(flat, tail.transpose(1, 2)) * scale, softcap)
    if visible is not None:
        seen = visible.expand(batch, heads, count, -1).reshape(batch * heads, 1, count, -1)
        recent = recent.unflatten(1, (group, count)).masked_fill(~seen, float("-inf")).flatten(1, 2)
    older = _capped(torch.bmm(flat[base.owner], base.keys.to(wide).transpose(1, 2)) * scale, softcap)
    slot = torch.arange(older.shape[-1], device=older.device)
    older = older.masked_fill((slot >= base.filled[:, None])[:, None], float("-inf"))

    most = recent.amax(-1)
    sinks = None
    if attention_sinks is not None:
        sinks = attention_sinks.to(wide)[None, :, :, None].expand(batch, -1, -1, count).reshape(most.shape)
        most = torch.maximum(most, sinks)
    most = most.scatter_reduce(0, base.owner[:, None].expand(-1, most.shape[1]), older.amax(-1), "amax")
    # A query that sees nothing (padding in a row without a base) has no maximum; its result is never used.
    most = most.clamp(min=torch.finfo(wide).min)

    near = torch.exp(recent - most.unsqueeze(-1))
    far = torch.exp(older - most[base.owner].unsqueeze(-1))
    total = near.sum(-1).index_add_(0, base.owner, far.sum(-1))
    if sinks is not None:
        total = total + torch.exp(sinks - most)
    values = tail_values.to(wide).reshape(batch * heads, *tail_values.shape[2:])
    result = torch.bmm(near, values)
    result.index_add_(0, base.owner, torch.bmm(far, base.values.to(wide)))
    result = result / total.clamp(min=torch.finfo(wide).tiny).unsqueeze(-1)
    return result.to(queries.dtype).reshape(batch, query_heads, count, -1)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
