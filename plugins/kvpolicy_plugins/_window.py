"""What scorers share that look at the last queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxtyping import Bool, Float32, Int32
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.view import CacheView, lacking
from kvpolicy.ops.attention import attention_logits, causal_mask
from kvpolicy.types import Mask, Queries, Weights

_NO_QUERY = 2**31 - 1
# Weights that are held at a time, as in `ops.window_importance`.
_WEIGHTS = {"cpu": 1 << 18}
_WEIGHTS_ELSEWHERE = 1 << 24


def excused_by_smoothing(width: int) -> Mapping[str, str]:
    """Return the law that does not hold where scores are smoothed over so many neighbours, and why."""
    return {"permuting_entries": "smoothing mixes an entry's score with its neighbours'"} if width > 1 else {}


class LastQueries(NamedTuple):
    """The last queries of every row.

    Attributes:
        queries: `[B, H, G, Q, D]`, in any order.
        positions: int32 `[B, Q]`.
        valid: bool `[B, Q]`, which of them count.
    """

    queries: Queries
    positions: Int32[Tensor, "B Q"]
    valid: Bool[Tensor, "B Q"]

    def older(self, view: CacheView) -> Mask:
        """Mark the entries older than the oldest query that counts, bool `[B, H, N]`; none where no query counts."""
        if self.positions.shape[1] == 0:
            return view.valid.new_zeros(view.shape)
        oldest = self.positions.masked_fill(~self.valid, _NO_QUERY).amin(-1)[:, None, None]
        return view.valid & (view.positions < oldest) & self.valid.any(-1)[:, None, None]

    def number(self) -> Tensor:
        """How many queries count in each row, at least 1; `[B, 1, 1]`."""
        return self.valid.sum(-1).clamp(min=1)[:, None, None]


def last_queries(view: CacheView, observe: int, who: str) -> LastQueries:
    """Return the newest `observe` queries of each row, fewer where it has seen fewer.

    Raises:
        UnsupportedError: the view holds no queries; `who` names the component.
    """
    if view.queries is None or view.query_positions is None or view.query_valid is None:
        raise lacking(who, "the last queries", "`queries`, `query_positions` and `query_valid`")
    counted = view.query_valid
    if view.queries.shape[3] > observe:
        # Another component asked for more: only the newest `observe` of them count here.
        newest = view.query_positions.masked_fill(~counted, -1).amax(dim=-1, keepdim=True)
        counted = counted & (view.query_positions > newest - observe)
    return LastQueries(view.queries, view.query_positions, counted)


class Piece(NamedTuple):
    """What some queries see of the entries of some heads.

    Attributes:
        heads: which KV heads of the view.
        weights: fp32 `[B, h, G, Q, N]`, softmax weights of each query; 0 for what it cannot see.
        logits: fp32 `[B, h, G, Q, N]`, scaled and soft-capped; 0 for what it cannot see.
    """

    heads: slice
    weights: Weights
    logits: Float32[Tensor, "B h G Q N"]


def attention_pieces(view: CacheView, window: LastQueries) -> Iterator[Piece]:
    """Yield the attention of the window, few heads at a time, so that what is held stays small; a head is never cut."""
    batch, heads, group, count = window.queries.shape[:4]
    each = batch * group * count * view.shape[2]
    some = max(1, _WEIGHTS.get(view.device.type, _WEIGHTS_ELSEWHERE) // max(each, 1))
    for first in range(0, heads, some):
        part = slice(first, first + some)
        seen = causal_mask(window.positions, window.valid, view.positions[:, part], view.valid[:, part]).unsqueeze(2)
        logits = attention_logits(window.queries[:, part], view.keys[:, part], view.scale, view.softcap)
        logits = logits.masked_fill_(~seen, 0.0)
        sinks = None if view.attention_sinks is None else view.attention_sinks[None, part, :, None]
        yield Piece(part, ops.masked_softmax(logits, seen, sinks), logits)
