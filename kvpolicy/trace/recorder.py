"""Writes down every compaction of a cache; without a recorder nothing of this runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.policy.policy import Policy, Scored
from kvpolicy.trace.recording import Recording, Snapshot

if TYPE_CHECKING:
    from torch import Tensor

    from kvpolicy.contracts.view import CacheView
    from kvpolicy.runtimes.hf import PolicyCache
    from kvpolicy.types import KeepIndices, Mask, Scores

_MOST = 64  # snapshots of scores


@dataclass(frozen=True)
class _Layer:
    """One layer at a compaction: positions and validity `[H, N]`, importance and redundancy where they are noted."""

    positions: Tensor
    valid: Tensor
    importance: Tensor | None
    redundancy: Tensor | None


class Recorder:
    """Records one text that goes through one cache.

    ::

        recorder = Recorder()
        with PolicyCache(recorder.watch(policy), model) as cache:
            model.generate(**inputs, past_key_values=cache)
            recording = recorder.recording(cache)

    Which compaction evicted an entry is kept for every entry. Scores are kept of every compaction until there are
    more than `snapshots`, then of every second, every fourth and so on: memory does not grow with the compactions.

    Args:
        snapshots: of how many compactions at most scores are kept, at least 2.
    """

    def __init__(self, snapshots: int = _MOST) -> None:
        if snapshots < 2:
            raise ValueError(f"snapshots: {snapshots} are too few to halve them; write at least 2.")
        self._most = snapshots
        self._stride = 1
        self._seen: list[int] = []
        self._heads: list[int] = []
        self._evicted = torch.zeros(0, 0, dtype=torch.int32)
        self._snapshots: list[Snapshot] = []
        self._layers: list[_Layer] = []
        self._shared: tuple[list[Scores], list[Mask]] = ([], [])

    def watch(self, policy: Policy) -> Policy:
        """Return a policy that decides the same and reports every decision to this recorder."""
        parts = {part.name: getattr(policy, part.name) for part in fields(Policy)}
        return _Watched(**parts, recorder=self)

    def recording(self, cache: PolicyCache) -> Recording:
        """Return what was recorded; runs the compactions that are due in `cache`, as the next step would.

        Raises:
            CacheStateError: the cache is not the one that was recorded, or nothing has gone through it.
        """
        engine = cache.engine
        if not engine.rows or engine.rows[0].compactions != len(self._seen):
            raise CacheStateError(
                f"recording: the cache has not made the {len(self._seen)} compactions that were recorded; give the "
                "cache that was made with watch(policy), after a text has gone through it."
            )
        _one_row(len(engine.rows))
        engine.settle()
        row = engine.rows[0]
        heads = tuple(engine.stores[layer].shape.heads for layer in engine.layers)
        evicted = torch.zeros(sum(heads), row.seen, dtype=torch.int32)
        known = min(row.seen, self._evicted.shape[1])
        evicted[: self._evicted.shape[0], :known] = self._evicted[:, :known]
        return Recording(
            layers=tuple(engine.layers),
            heads=heads,
            prompt=row.prompt,
            seen=row.seen,
            compactions=np.array(self._seen, dtype=np.int32),
            evicted=evicted.numpy(),
            snapshots=tuple(self._snapshots),
        )

    # -- what the watched policy calls --------------------------------------------------------------------------------

    def begin(self, rows: int) -> None:
        """Start the record of a compaction of so many rows."""
        _one_row(rows)
        self._layers = []
        self._shared = ([], [])

    def note_scores(self, view: CacheView, scored: Scored, policy: Policy) -> None:
        """Take the scores of one layer, or of several that are folded into one view."""
        if view.compaction[0] != len(self._seen):
            raise CacheStateError(
                f"recorder: a row with {int(view.compaction[0])} compactions comes where {len(self._seen)} were "
                "recorded; use a new recorder for each text, and a cache of one row."
            )
        noted = self._snaps
        importance = scored.importance if noted and policy.mixer.uses_importance else None
        redundancy = scored.redundancy if noted and policy.mixer.uses_redundancy else None
        for i, (positions, valid) in enumerate(zip(view.positions, view.valid, strict=True)):
            one = [None if each is None else each[i] for each in (importance, redundancy)]
            self._layers.append(_Layer(positions, valid, *one))

    def note_shared(self, scores: list[Scores], protected: list[Mask]) -> None:
        """Take what the selection ranks: of every layer `[1, H, N]`, the same for heads that share a set."""
        self._shared = (scores, protected)

    def finish(self, seen: int, keeps: Sequence[KeepIndices]) -> None:
        """Take what stays of each layer after `seen` tokens."""
        self._heads = [len(layer.valid) for layer in self._layers]
        if self._snaps:
            self._snapshots.append(self._snapshot())
        self._seen.append(seen)
        number = len(self._seen)
        if len(self._snapshots) > self._most:
            self._stride *= 2
            self._snapshots = [each for each in self._snapshots if (each.compaction - 1) % self._stride == 0]
        self._grow(seen)
        first = 0
        for layer, keep in zip(self._layers, keeps, strict=True):
            gone = layer.valid & ~keep.mask(layer.valid.shape[1])[0]
            head, slot = gone.cpu().nonzero(as_tuple=True)
            self._evicted[first + head, layer.positions.cpu()[head, slot].long()] = number
            first += len(layer.valid)
        self._layers = []
        self._shared = ([], [])

    @property
    def _snaps(self) -> bool:
        return len(self._seen) % self._stride == 0

    def _snapshot(self) -> Snapshot:
        retention, protected = self._shared

        def flat(tensors: Sequence[Tensor | None]) -> np.ndarray | None:
            parts = [t[layer.valid].cpu() for t, layer in zip(tensors, self._layers, strict=True) if t is not None]
            return torch.cat(parts).numpy() if parts else None

        ranked, pinned = flat([each[0] for each in retention]), flat([each[0] for each in protected])
        assert ranked is not None
        assert pinned is not None
        return Snapshot(
            compaction=len(self._seen) + 1,
            importance=flat([layer.importance for layer in self._layers]),
            redundancy=flat([layer.redundancy for layer in self._layers]),
            retention=ranked,
            protected=pinned,
        )

    def _grow(self, seen: int) -> None:
        rows, columns = self._evicted.shape
        if columns < seen:
            larger = torch.zeros(sum(self._heads), max(seen, 2 * columns), dtype=torch.int32)
            larger[:rows, :columns] = self._evicted
            self._evicted = larger


@dataclass(frozen=True)
class _Watched(Policy):
    """A policy that tells a recorder what it scored, ranked and kept."""

    recorder: Recorder = field(default_factory=Recorder, repr=False, compare=False)

    def retention(self, view: CacheView) -> Scores:
        scored = self.scores(view)
        self.recorder.note_scores(view, scored, self)
        return scored.retention

    def _share(
        self, scores: list[Scores], protected: list[Mask], allowed: list[Mask]
    ) -> tuple[list[Scores], list[Mask], list[Mask]]:
        shared = super()._share(scores, protected, allowed)
        self.recorder.note_shared(shared[0], shared[1])
        return shared

    def select(self, views: Sequence[CacheView], budget: Sequence[int]) -> list[KeepIndices]:
        self.recorder.begin(len(budget))
        keeps = super().select(views, budget)
        self.recorder.finish(int(views[0].seen[0]), keeps)
        return keeps


def _one_row(rows: int) -> None:
    if rows != 1:
        raise UnsupportedError(f"a recorder records one text, and the batch has {rows} rows; run them one by one.")
