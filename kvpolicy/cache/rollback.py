"""Whether tokens can be taken back, or hidden, after they have been stored, and what a crop leaves to score with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.cache.columns import Columns
from kvpolicy.cache.ledger import RowCounts
from kvpolicy.errors import CacheStateError


def tokens_to_crop(
    rows: Sequence[RowCounts], columns: Columns, count: int, *, unobserved: int | None, policy: str
) -> list[int]:
    """Return how many tokens each row would lose with the last `count` columns.

    Args:
        rows: the counters.
        columns: what has been seen.
        count: columns to take back.
        unobserved: columns that no accumulating scorer has observed yet; None when there is no such scorer.
        policy: name of the policy, for messages.

    Raises:
        CacheStateError: a row has been compacted since, or something has been observed that cannot be forgotten.
    """
    if count > columns.total:
        raise CacheStateError(f"crop: {count} tokens are more than the {columns.total} that the cache has seen.")
    lost = columns.tokens_in_last(count, len(rows))
    for row, tokens in zip(rows, lost, strict=True):
        if row.seen - tokens < row.floor:
            raise CacheStateError(
                f"crop: {count} tokens back lies before the last compaction, which was at token {row.floor} of "
                f"{row.seen}; crop at most {row.seen - row.floor} tokens, or fork() the cache before going on."
            )
    if unobserved is not None and count > unobserved:
        raise CacheStateError(
            f"crop: what policy {policy!r} has observed of the queries can be taken back by {unobserved} tokens at "
            f"present, not by {count}; fork() the cache before going on."
        )
    return lost


def slots_to_keep(
    rows: Sequence[RowCounts], used: Sequence[int], known: Tensor, past: Tensor, *, observed: int, policy: str
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return what is left of rows some of whose tokens have become padding, by row.

    Args:
        rows: the counters.
        used: slots of the store in use, per row.
        known: bool `[B, columns]` on the CPU, which columns were tokens when they came.
        past: bool `[B, columns]`, which are tokens by a later mask.
        observed: columns whose queries an accumulating scorer has observed, from the first one on.
        policy: name of the policy, for messages.

    Returns:
        The slots int64 `[n]` that stay, and which tokens these are: bool `[seen]`, by position.

    Raises:
        CacheStateError: padding has become real, or such a row has been compacted, or its queries observed, since.
    """
    if bool((past & ~known).any()):
        raise CacheStateError("attention_mask shows tokens that were padding before; keep the mask of earlier turns.")
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for b, row in enumerate(rows):
        if torch.equal(known[b], past[b]):
            continue
        # Every entry must still be there, in slots and in order of position, or nobody knows which one is meant.
        if row.compactions or used[b] != row.resident or row.resident != int(known[b].sum()):
            raise CacheStateError(
                f"attention_mask hides tokens of row {b} that were real before, and the row has been compacted "
                "since; give rows that end at different times a cache each."
            )
        if not torch.equal(known[b, :observed], past[b, :observed]):
            raise CacheStateError(
                f"attention_mask hides tokens of row {b}, and what policy {policy!r} has observed of their queries "
                "cannot be forgotten; give rows that end at different times a cache each."
            )
        visible = past[b][known[b]]
        kept[b] = visible.nonzero()[:, 0], visible
    return kept


def check_window(rows: Sequence[RowCounts], due: Sequence[int], left: Sequence[int], wanted: int, policy: str) -> None:
    """Refuse to score with fewer queries than a policy looks at, which a deep crop may have left for some steps.

    Args:
        rows: the counters.
        due: rows that are about to be compacted.
        left: queries at hand per row.
        wanted: queries that the policy looks at.
        policy: its name, for messages.

    Raises:
        CacheStateError: too few are left.
    """
    for b in due:
        if left[b] < min(wanted, rows[b].seen):
            raise CacheStateError(
                f"policy {policy!r} looks at the last {wanted} queries, but a crop, or a mask that hides tokens, has "
                f"left only {left[b]} of them; decode {wanted - left[b]} more tokens one by one before giving many at "
                "once, or crop less."
            )
