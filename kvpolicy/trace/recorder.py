"""Writes down every compaction of a cache; without a recorder nothing of this runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvpolicy.contracts.ranks import ALONE, Ranks
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.policy.decision import Decision
from kvpolicy.policy.policy import Policy
from kvpolicy.trace.recording import Recording, Snapshot

if TYPE_CHECKING:
    from torch import Tensor

    from kvpolicy.contracts.view import CacheView
    from kvpolicy.runtimes.hf import PolicyCache

_MOST = 64  # snapshots of scores


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

    def watch(self, policy: Policy) -> Policy:
        """Return a policy that decides the same and reports every decision to this recorder."""
        parts = {part.name: getattr(policy, part.name) for part in fields(Policy)}
        return _WatchedPolicy(**parts, recorder=self)

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
        heads = tuple(engine.stores[layer].layout.heads for layer in engine.layers)
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

    def note(self, views: Sequence[CacheView], decision: Decision, policy: Policy) -> None:
        """Take a decision of a policy that this recorder watches."""
        layers: list[tuple[Tensor, Tensor]] = []  # positions and validity, `[H, N]`: views may be copies
        for view in views:
            if view.compaction[0] != len(self._seen):
                raise CacheStateError(
                    f"recorder: a row with {int(view.compaction[0])} compactions comes where {len(self._seen)} were "
                    "recorded; use a new recorder for each text, and a cache of one row."
                )
            seen = int(view.seen[0])
            layers.append((view.positions[0], view.valid[0]))
        self._heads = [len(valid) for _, valid in layers]
        if len(self._seen) % self._stride == 0:
            self._snapshots.append(self._snapshot([valid for _, valid in layers], decision, policy))
        self._seen.append(seen)
        number = len(self._seen)
        if len(self._snapshots) > self._most:
            self._stride *= 2
            self._snapshots = [each for each in self._snapshots if (each.compaction - 1) % self._stride == 0]
        self._grow(seen)
        first = 0
        for (positions, valid), keep in zip(layers, decision.kept, strict=True):
            gone = valid & ~keep.mask(valid.shape[1])[0]
            head, slot = gone.cpu().nonzero(as_tuple=True)
            self._evicted[first + head, positions.cpu()[head, slot].long()] = number
            first += len(valid)

    def _snapshot(self, valid: list[Tensor], decision: Decision, policy: Policy) -> Snapshot:
        def flat(tensors: Sequence[Tensor]) -> np.ndarray:
            """Join what stands in the valid slots of `[1, H, N]` tensors, layer by layer and head by head."""
            return torch.cat([t[0][v].cpu() for t, v in zip(tensors, valid, strict=True)]).numpy()

        mixer, scored = policy.mixer, decision.scored
        return Snapshot(
            compaction=len(self._seen) + 1,
            importance=flat([each.importance for each in scored]) if mixer.uses_importance else None,
            redundancy=flat([each.redundancy for each in scored]) if mixer.uses_redundancy else None,
            retention=flat(decision.shared.scores),
            protected=flat(decision.shared.protected),
        )

    def _grow(self, seen: int) -> None:
        rows, columns = self._evicted.shape
        if columns < seen:
            larger = torch.zeros(sum(self._heads), max(seen, 2 * columns), dtype=torch.int32)
            larger[:rows, :columns] = self._evicted
            self._evicted = larger


@dataclass(frozen=True)
class _WatchedPolicy(Policy):
    """A policy that tells a recorder what it scored, ranked and kept."""

    recorder: Recorder = field(default_factory=Recorder, repr=False, compare=False)

    def decide(self, views: Sequence[CacheView], budget: Sequence[int], ranks: Ranks = ALONE) -> Decision:
        _one_row(len(budget))
        decision = super().decide(views, budget, ranks)
        self.recorder.note(views, decision, self)
        return decision


def _one_row(rows: int) -> None:
    if rows != 1:
        raise UnsupportedError(f"a recorder records one text, and the batch has {rows} rows; run them one by one.")
