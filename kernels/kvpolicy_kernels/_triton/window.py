"""From softmax statistics to the smoothed mean attention of every candidate."""

import triton
import triton.language as tl

from kvpolicy_kernels._triton.common import NEVER, load_mask, row_of, tile_of
from kvpolicy_kernels._triton.scan import group_logits, visible_to


@triton.jit(do_not_specialize=["heads", "queries", "tiles"])
def fold_statistics(
    max_ptr, sum_ptr, count_ptr, asked_ptr, sink_ptr, shift_ptr, weight_ptr, before_ptr, peak_ptr,
    heads, queries, tiles,
    GROUP: tl.constexpr, ROWS: tl.constexpr, MEAN: tl.constexpr, WITH_SINKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per row: join the statistics of the tiles and the sinks, and count the candidates before each tile.

    A query's weight is 1 over (its sum of exponentials, the number of queries that are asked, and the heads when their
    mean is taken), 0 when it sees nothing.
    """
    row, b, h = row_of(tl.program_id(0), heads)
    rows = GROUP * queries
    index = tl.arange(0, ROWS)
    there = index < rows
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if WITH_SINKS:
        most = tl.load(sink_ptr + h * GROUP + index // queries, mask=there, other=0.0)
        total += 1.0
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        spot = (row * tiles + at[:, None]) * rows + index[None, :]
        mask = (at < tiles)[:, None] & there[None, :]
        new = tl.load(max_ptr + spot, mask=mask, other=float("-inf"))
        part = tl.load(sum_ptr + spot, mask=mask, other=0.0)
        larger = tl.maximum(most, tl.max(new, 0))
        # All -inf: nothing was seen so far, and -inf - -inf is no number.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(most - shift) + tl.sum(part * tl.exp(new - shift[None, :]), 0)
        most = larger
    asked = load_mask(asked_ptr + b * queries, 1, index % queries, there)
    query = tl.arange(0, ROWS)
    number = tl.sum(load_mask(asked_ptr + b * queries, 1, query, query < queries).to(tl.float32), 0)
    share = number * GROUP if MEAN else number
    used = asked & (total != 0.0)
    tl.store(shift_ptr + row * rows + index, tl.where(most == float("-inf"), 0.0, most), mask=there)
    weight = tl.where(used, 1.0 / tl.where(used, total * share, 1.0), 0.0)
    tl.store(weight_ptr + row * rows + index, weight, mask=there)

    before = tl.zeros([], tl.int32)
    for start in range(0, tiles, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts = tl.load(count_ptr + row * tiles + at, mask=at < tiles, other=0)
        upto = tl.cumsum(counts, 0) + before
        tl.store(before_ptr + row * (tiles + 1) + at, upto - counts, mask=at < tiles)
        before += tl.sum(counts, 0)
    tl.store(before_ptr + row * (tiles + 1) + tiles, before)
    tl.store(peak_ptr + row, tl.zeros([], tl.int32))


@triton.jit
def tile_candidates(valid_ptr, vb, vh, vn, pos_ptr, pb, ph, pn, asked_ptr, at_ptr, b, h, column, n, queries, query):
    """Return held, position, candidate, query positions and asked queries of a tile."""
    held = load_mask(valid_ptr + b * vb + h * vh, vn, column, column < n)
    position = tl.load(pos_ptr + b * pb + h * ph + column * pn, mask=held, other=NEVER)
    asked = load_mask(asked_ptr + b * queries, 1, query, query < queries)
    query_position = tl.load(at_ptr + b * queries + query, mask=asked, other=NEVER)
    return held, position, held & (position < tl.min(query_position, 0)), query_position, asked


@triton.jit(do_not_specialize=["n", "heads", "queries", "scale", "cap", "vb", "vh", "pb", "ph"])
def mean_weights(
    k_ptr, kb, kh, kn, valid_ptr, vb, vh, vn, q_ptr, qb, qh, qg, qq, asked_ptr, at_ptr, pos_ptr, pb, ph, pn,
    logit_ptr, shift_ptr, weight_ptr, before_ptr, packed_ptr, rank_ptr, peak_ptr,
    scale, cap, n, heads, queries,
    D: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    BY_HEAD: tl.constexpr, MEAN: tl.constexpr, OVER_ROW: tl.constexpr, CAPPED: tl.constexpr, EACH: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Per tile: mean weight of each candidate, packed to the candidates' own order, and the rank of each slot.

    With `EACH` the queries' shares of the mean, `[R, queries, n]`, which are to be smoothed before they are added up.

    Ranks: 0 and up for candidates, -1 for other valid slots, -2 for the rest. `BY_HEAD` computes the logits again
    rather than to have stored them for all query heads.
    """
    row, b, h, tile, tiles, column = tile_of(n, heads, TILE)
    query = tl.arange(0, QUERIES)
    here = query < queries
    held, position, candidate, query_position, asked = tile_candidates(
        valid_ptr, vb, vh, vn, pos_ptr, pb, ph, pn, asked_ptr, at_ptr, b, h, column, n, queries, query
    )
    if BY_HEAD:
        dim = tl.arange(0, D)
        k_at = k_ptr + b * kb + h * kh + column[:, None] * kn + dim[None, :]
        k = tl.load(k_at, mask=held[:, None], other=0.0)
        visible = visible_to(held, position, candidate, query_position, asked, OVER_ROW)
        q_row = q_ptr + b * qb + h * qh
        weights = tl.zeros([TILE, QUERIES], tl.float32)
        for g in range(0, GROUP):  # not unrolled: logits of several heads at a time would spill
            at = (row * GROUP + g) * queries + query
            shift = tl.load(shift_ptr + at, mask=here, other=0.0)
            share = tl.load(weight_ptr + at, mask=here, other=0.0)
            logit = group_logits(
                k, k_at, held, q_row, qg, qq, query, dim, asked, scale, cap, g, D, PARTS, CAPPED, UPCAST
            )
            weight = tl.exp(tl.where(visible, logit, float("-inf")) - shift[None, :]) * share[None, :]
            if MEAN:
                weights += weight
            else:
                weights = tl.maximum(weights, weight, propagate_nan=tl.PropagateNan.ALL)
    else:
        shift = tl.load(shift_ptr + row * queries + query, mask=here, other=0.0)
        share = tl.load(weight_ptr + row * queries + query, mask=here, other=0.0)
        spot = (row * queries + query[None, :]) * n + column[:, None]
        logit = tl.load(logit_ptr + spot, mask=(column < n)[:, None] & here[None, :], other=float("-inf"))
        weights = tl.exp(logit - shift[None, :]) * share[None, :]
    rank = tl.load(before_ptr + row * (tiles + 1) + tile) + tl.cumsum(candidate.to(tl.int32), 0) - 1
    code = tl.where(candidate, rank, tl.where(held, -1, -2))
    tl.store(rank_ptr + row * n + column, code, mask=column < n)
    if EACH:
        spot = (row * queries + query[None, :]) * n + rank[:, None]
        tl.store(packed_ptr + spot, weights, mask=candidate[:, None] & here[None, :])
    else:
        score = tl.sum(weights, 1)
        tl.store(packed_ptr + row * n + rank, score, mask=candidate)
        # Scores are not negative, so their bits are ordered as they are; a maximum does not depend on the order.
        peak = tl.max(tl.where(candidate, score.to(tl.int32, bitcast=True), 0), 0)
        tl.atomic_max(peak_ptr + row, peak, sem="relaxed")


@triton.jit(do_not_specialize=["n", "heads", "tiles", "lines", "reach_back", "reach_on"])
def smooth_weights(
    packed_ptr, rank_ptr, before_ptr, peak_ptr, out_ptr, n, heads, tiles, lines, reach_back, reach_on,
    TILE: tl.constexpr, KIND: tl.constexpr, PEAK: tl.constexpr,
):  # fmt: skip
    """Per tile: maximum or mean over the neighbouring candidates of each of `lines` rows, added up.

    `KIND`: ``max``, ``mean``, or ``mean_zero_padded``. With `PEAK` slots of the window get the head's largest score,
    which a maximum does not change; without it they get 0.
    """
    row, _, _, _, _, column = tile_of(n, heads, TILE)
    inside = column < n
    rank = tl.load(rank_ptr + row * n + column, mask=inside, other=-2)
    count = tl.load(before_ptr + row * (tiles + 1) + tiles)
    score = tl.zeros([TILE], tl.float32)
    for line in range(0, lines):
        best = tl.zeros([TILE], tl.float32)
        number = tl.zeros([TILE], tl.float32)
        for offset in range(-reach_back, reach_on + 1):
            at = rank + offset
            near = (rank >= 0) & (at >= 0) & (at < count)
            one = tl.load(packed_ptr + (row * lines + line) * n + at, mask=near, other=0.0)
            if KIND == "max":
                best = tl.maximum(best, one, propagate_nan=tl.PropagateNan.ALL)
            else:
                best += one
                number += near.to(tl.float32)
        if KIND == "mean":
            best = best / tl.maximum(number, 1.0)
        if KIND == "mean_zero_padded":
            best = best / (reach_back + reach_on + 1)
        score += best
    if PEAK:
        peak = tl.load(peak_ptr + row).to(tl.float32, bitcast=True)
        score = tl.where(rank == -1, peak, score)
    tl.store(out_ptr + row * n + column, score, mask=inside)
