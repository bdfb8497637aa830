"""Importance from an observation window in Triton; the definition is `kvpolicy.ops.window`."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from kvpolicy.ops import arguments
from kvpolicy.ops.dispatch import scratch
from kvpolicy.types import Keys, Mask, Positions, Queries, Scores
from kvpolicy_kernels import served
from kvpolicy_kernels.launching import as_bytes, batches, launch, padded, parts_of, upcast
from kvpolicy_kernels.similarity import TILE, Norms


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
    smooth_kind: str = "max",
    smooth_stage: str = "mean",
) -> Scores:
    """As `kvpolicy.ops.window_importance`.

    Raises:
        UnsupportedError: an option has no kernel.
        ValueError: arguments do not fit together.
    """
    served.require(served.window_importance(queries, query_positions, query_valid, keys, positions, valid))
    batch, heads, n = keys.shape[:3]
    count = queries.shape[3]
    device = keys.device
    arguments.window_importance(
        queries, query_positions, query_valid, keys, positions, valid, attention_sinks=attention_sinks
    )
    if count == 0 or n == 0 or batch == 0:
        return torch.zeros(batch, heads, n, dtype=torch.float32, device=device)
    out = torch.empty(batch, heads, n, dtype=torch.float32, device=device)
    asked, at = query_valid.contiguous(), query_positions.contiguous()
    by_head = group_stage == "weights"
    each = smooth > 1 and smooth_stage == "query"
    numbers = 1 + (0 if by_head else count) + (count if each else 1)
    parts = list(batches(batch, Norms.bytes_each(keys) + 4 * heads * n * numbers))
    sinks = None
    if attention_sinks is not None:  # reduced like the logits where those are
        sinks = attention_sinks.float()
        if not by_head:
            sinks = sinks.amax(1) if group == "max" else sinks.mean(1)
        sinks = sinks.contiguous()
    options = _WindowOptions(
        scale, softcap, sinks, smooth, smooth_kind, each, by_head, group == "mean", softmax_over == "row"
    )
    # The redundancy of the same view finds its norms here, from this one read of the keys.
    at_hand = scratch()
    norms = Norms.like(keys) if at_hand is not None and len(parts) == 1 else None
    for part in parts:
        _part(queries[part], at[part], asked[part], keys[part], positions[part], valid[part], out[part], norms, options)
    if at_hand is not None and norms is not None:
        at_hand["norms"] = (keys, valid, norms)
    return out


class _WindowOptions(NamedTuple):
    scale: float
    softcap: float | None
    sinks: Tensor | None
    smooth: int
    smooth_kind: str
    each: bool
    by_head: bool
    mean: bool
    over_row: bool


def _part(
    queries: Queries, at: Tensor, asked: Tensor, keys: Keys, positions: Positions, valid: Mask, out: Tensor,
    norms: Norms | None, options: _WindowOptions,
) -> None:  # fmt: skip
    scale, softcap, sinks, smooth, kind, each, by_head, mean, over_row = options
    batch, heads, n, dim = keys.shape
    size, count = queries.shape[2:4]
    rows, tiles = batch * heads, -(-n // TILE)
    stats = size * count if by_head else count

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=keys.device)

    logits = None if by_head else new(rows, count, n)
    most, total = new(rows, tiles, stats), new(rows, tiles, stats)
    counts = new(rows, tiles, dtype=torch.int32)
    capped, cap = softcap is not None, float(softcap or 0.0)
    flags = {"BY_HEAD": by_head, "MEAN": mean, "OVER_ROW": over_row, "CAPPED": capped, "UPCAST": upcast()}
    width, parts = parts_of(dim)
    sizes = {"D": width, "PARTS": parts, "TILE": TILE, "GROUP": size, "QUERIES": padded(count)}
    held = (as_bytes(valid), *valid.stride())
    asking = (queries, *queries.stride()[:4], as_bytes(asked), at, positions, *positions.stride())
    launch(
        "scan.scan_keys", rows * tiles,
        keys, *keys.stride()[:3], *held, *(norms or (None,) * 5), *asking, logits, most, total, counts,
        scale, cap, n, heads, count, **sizes, **flags, NORMS=norms is not None, LOGITS=True,
    )  # fmt: skip
    shift, weight = new(rows, stats), new(rows, stats)
    before, peak = new(rows, tiles + 1, dtype=torch.int32), new(rows, dtype=torch.int32)
    launch(
        "window.fold_statistics", rows,
        most, total, counts, as_bytes(asked), sinks, shift, weight, before, peak, heads, count, tiles,
        GROUP=size if by_head else 1, ROWS=padded(stats), MEAN=mean, WITH_SINKS=sinks is not None, BLOCK=16,
    )  # fmt: skip
    lines = count if each else 1
    packed, rank = new(rows, lines, n), new(rows, n, dtype=torch.int32)
    if not by_head:  # it then depends on neither; fewer variants to compile
        sizes |= {"D": 16, "PARTS": 1, "GROUP": 1}
        flags |= {"MEAN": False, "OVER_ROW": False, "CAPPED": False}
    launch(
        "window.mean_weights", rows * tiles,
        keys, *keys.stride()[:3], *held, *asking, logits, shift, weight, before, packed, rank, peak,
        scale, cap, n, heads, count, **sizes, **flags, EACH=each,
    )  # fmt: skip
    launch(
        "window.smooth_weights", rows * tiles,
        packed, rank, before, peak, out, n, heads, tiles, lines, smooth // 2, (smooth - 1) // 2,
        TILE=TILE, KIND=kind if smooth > 1 else "max", PEAK=(kind == "max" or smooth == 1) and not each,
    )  # fmt: skip
    if each or (smooth > 1 and kind != "max"):  # the largest score of a head is known now only
        window = rank.view(out.shape) == -1
        out.copy_(torch.where(window, out.amax(-1, keepdim=True), out))
