"""One read of the keys for all that importance and redundancy need of them."""

import triton
import triton.language as tl

from kvpolicy_kernels._triton.common import NEVER, capped, dot, load_mask, tile_of


@triton.jit
def group_logits(
    k, k_at, held, q_row, qg, qq, query, dim, asked, scale, cap, g,
    D: tl.constexpr, PARTS: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Logits `[TILE, QUERIES]` of one query head; `k` is the first of the keys' `PARTS` parts, `k_at` where it lies."""
    q_at = q_row + g * qg + query[:, None] * qq + dim[None, :]
    logit = dot(k, tl.trans(tl.load(q_at, mask=asked[:, None], other=0.0)), UPCAST)
    for part in tl.static_range(1, PARTS):
        more = tl.load(k_at + part * D, mask=held[:, None], other=0.0)
        logit += dot(more, tl.trans(tl.load(q_at + part * D, mask=asked[:, None], other=0.0)), UPCAST)
    logit *= scale
    if CAPPED:
        logit = capped(logit, cap)
    return logit


@triton.jit
def visible_to(held, position, candidate, query_position, asked, OVER_ROW: tl.constexpr):
    """Which slots enter the softmax of which query, `[TILE, QUERIES]`."""
    if OVER_ROW:
        seen = (position[:, None] <= query_position[None, :]) & held[:, None]
    else:
        seen = candidate[:, None]
    return seen & asked[None, :]


@triton.jit
def store_statistics(masked, max_ptr, sum_ptr, at, keep):
    """Store maximum and sum of exponentials of one tile; a tile without visible slots has -inf and 0."""
    most = tl.max(masked, 0)
    shift = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(tl.exp(masked - shift[None, :]), 0)
    tl.store(max_ptr + at, most, mask=keep)
    tl.store(sum_ptr + at, total, mask=keep)


@triton.jit(do_not_specialize=["n", "heads", "queries", "scale", "cap", "vb", "vh", "pb", "ph"])
def scan_keys(
    k_ptr, kb, kh, kn, valid_ptr, vb, vh, vn,
    inverse_ptr, partial_ptr, first_ptr, held_ptr, lost_ptr,
    q_ptr, qb, qh, qg, qq, asked_ptr, at_ptr, pos_ptr, pb, ph, pn,
    logit_ptr, max_ptr, sum_ptr, count_ptr,
    scale, cap, n, heads, queries,
    D: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    NORMS: tl.constexpr, LOGITS: tl.constexpr, BY_HEAD: tl.constexpr, MEAN: tl.constexpr, OVER_ROW: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Per tile of keys: inverse norms and sums of unit keys (`NORMS`); logits and softmax statistics (`LOGITS`).

    `BY_HEAD` takes statistics per query head and stores no logits; otherwise the heads of a group become one first,
    their mean or maximum, and its logits are stored, -inf where a query does not see a slot.
    """
    row, b, h, tile, tiles, column = tile_of(n, heads, TILE)
    dim = tl.arange(0, D)
    inside = column < n
    held = load_mask(valid_ptr + b * vb + h * vh, vn, column, inside)
    k_at = k_ptr + b * kb + h * kh + column[:, None] * kn + dim[None, :]
    k = tl.load(k_at, mask=held[:, None], other=0.0)

    if NORMS:
        wide = k.to(tl.float32)
        square = tl.sum(wide * wide, 1)
        for part in tl.static_range(1, PARTS):
            more = tl.load(k_at + part * D, mask=held[:, None], other=0.0).to(tl.float32)
            square += tl.sum(more * more, 1)
        inverse = tl.rsqrt(tl.maximum(square, 1e-30))
        inverse = tl.where(held, inverse, 0.0)
        tl.store(inverse_ptr + row * n + column, inverse, mask=inside)
        tl.store(lost_ptr + row * n + column, tl.zeros([TILE], tl.int64), mask=inside)
        sum_at = partial_ptr + (row * tiles + tile) * D * PARTS + dim
        tl.store(sum_at, tl.sum(wide * inverse[:, None], 0))
        for part in tl.static_range(1, PARTS):
            more = tl.load(k_at + part * D, mask=held[:, None], other=0.0).to(tl.float32)
            tl.store(sum_at + part * D, tl.sum(more * inverse[:, None], 0))
        tl.store(first_ptr + row * tiles + tile, tl.min(tl.where(held, column, NEVER), 0))
        tl.store(held_ptr + row * tiles + tile, tl.sum(held.to(tl.int32), 0))

    if LOGITS:
        query = tl.arange(0, QUERIES)
        here = query < queries
        asked = load_mask(asked_ptr + b * queries, 1, query, here)
        query_position = tl.load(at_ptr + b * queries + query, mask=asked, other=NEVER)
        position = tl.load(pos_ptr + b * pb + h * ph + column * pn, mask=held, other=NEVER)
        candidate = held & (position < tl.min(query_position, 0))
        tl.store(count_ptr + row * tiles + tile, tl.sum(candidate.to(tl.int32), 0))
        visible = visible_to(held, position, candidate, query_position, asked, OVER_ROW)
        q_row = q_ptr + b * qb + h * qh
        pooled = tl.zeros([TILE, QUERIES], tl.float32)
        for g in tl.static_range(GROUP):
            logit = group_logits(
                k, k_at, held, q_row, qg, qq, query, dim, asked, scale, cap, g, D, PARTS, CAPPED, UPCAST
            )
            if BY_HEAD:
                at = ((row * tiles + tile) * GROUP + g) * queries + query
                store_statistics(tl.where(visible, logit, float("-inf")), max_ptr, sum_ptr, at, here)
            elif g == 0:
                pooled = logit
            elif MEAN:
                pooled += logit
            else:
                pooled = tl.maximum(pooled, logit, propagate_nan=tl.PropagateNan.ALL)
        if not BY_HEAD:
            if MEAN:
                pooled = pooled / GROUP
            masked = tl.where(visible, pooled, float("-inf"))
            store_statistics(masked, max_ptr, sum_ptr, (row * tiles + tile) * queries + query, here)
            spot = (row * queries + query[None, :]) * n + column[:, None]
            tl.store(logit_ptr + spot, masked, mask=inside[:, None] & here[None, :])
