"""Several layers as one view: what does not depend on the layer is computed for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from kvpolicy.contracts.view import CacheView, Rope

_SLOTS = {"cpu": 1 << 14}  # slots of all heads that are worked on together: temporary tensors stay small
_SLOTS_ELSEWHERE = 1 << 20


def folded(views: Sequence[CacheView]) -> list[tuple[CacheView, int]]:
    """Fold runs of layers whose caches lie at equal distances in one arena; nothing of keys or values is copied.

    Args:
        views: one per layer, `[B, H, N, ...]`, all of the same rows.

    Returns:
        (view, layers) in order; a view of `l` layers has `l * B` rows, the layers one after the other.
    """
    result: list[tuple[CacheView, int]] = []
    start = 0
    while start < len(views):
        first = views[start]
        room = _SLOTS.get(first.device.type, _SLOTS_ELSEWHERE) // max(first.valid.numel(), 1)
        stop = start + 1
        while stop < len(views) and stop - start < room and _alike(first, views[stop]):
            stop += 1
        run = views[start:stop]
        one = _fold(run) if len(run) > 1 else None
        if one is None:
            run = run[:1]
        result.append((run[0] if one is None else one, len(run)))
        start += len(run)
    return result


def _alike(first: CacheView, other: CacheView) -> bool:
    return (
        first.shape == other.shape
        and first.heads == other.heads
        and (first.scale, first.softcap) == (other.scale, other.softcap)
        and _same_rope(first.rope, other.rope)
        and first.attention_sinks is None
        and other.attention_sinks is None
        and not first.extras
        and not other.extras
    )


def _same_rope(first: Rope | None, other: Rope | None) -> bool:
    if first is None or other is None or first is other:
        return first is other
    return first.interleaved == other.interleaved and first.inv_freq.data_ptr() == other.inv_freq.data_ptr()


def _fold(views: Sequence[CacheView]) -> CacheView | None:
    """Return one view, or None when keys or values do not lie at equal distances."""
    keys, values = _strided([v.keys for v in views]), _strided([v.values for v in views])
    if keys is None or values is None:
        return None
    first, count = views[0], len(views)

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        at_hand = _strided(tensors)
        return torch.cat(list(tensors)) if at_hand is None else at_hand

    def repeated(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.repeat(count, *[1] * (tensor.dim() - 1))

    positions = joined([v.positions for v in views])
    turned = [v.rope_positions for v in views]
    queries = None if first.queries is None else torch.cat([v.queries for v in views if v.queries is not None])
    return replace(
        first,
        keys=keys,
        values=values,
        positions=positions,
        valid=joined([v.valid for v in views]),
        queries=queries,
        query_positions=repeated(first.query_positions),
        query_valid=repeated(first.query_valid),
        prompt_length=first.prompt_length.repeat(count),
        seen=first.seen.repeat(count),
        compaction=first.compaction.repeat(count),
        budget=repeated(first.budget),
        turned_back=repeated(first.turned_back),
        rope_positions=joined([t for t in turned if t is not None]) if turned[0] is not None else None,
        state=MappingProxyType({name: joined([v.state[name] for v in views]) for name in first.state}),
    )


def _strided(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return `[l * B, ...]` over tensors `[B, ...]` that lie at equal distances in one storage, or None."""
    first = tensors[0]
    step = tensors[1].storage_offset() - first.storage_offset()
    rows = first.shape[0]
    if rows > 1 and step != rows * first.stride(0):
        return None
    for n, tensor in enumerate(tensors):
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        at = first.storage_offset() + n * step
        if not same or tensor.stride() != first.stride() or tensor.storage_offset() != at:
            return None
    row = step if rows == 1 else first.stride(0)
    return first.as_strided((len(tensors) * rows, *first.shape[1:]), (row, *first.stride()[1:]))
