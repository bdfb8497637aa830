"""Recordings of chance, for tests of what shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from kvpolicy.trace.recording import Recording, Snapshot


def random_recording(
    *,
    tokens: int,
    prompt: int,
    layers: Iterable[int] = range(2),
    heads: int = 2,
    budget: int = 16,
    every: int = 8,
    kinds: Sequence[str] = ("importance", "redundancy", "retention"),
    seed: int = 0,
) -> Recording:
    """Return a consistent recording in which every head keeps what has the highest retention, its newest 4 always.

    Args:
        tokens: tokens that went into the cache.
        prompt: how many of them are the prompt.
        layers: indices of the layers.
        heads: KV heads of each layer.
        budget: entries that a head holds after a compaction.
        every: a compaction happens when `budget + every` entries are held, or more.
        kinds: which scores there are; the retention always is.
        seed: another seed is another recording.
    """
    rng, numbers = np.random.default_rng(seed), tuple(layers)
    rows = len(numbers) * heads
    evicted = np.zeros((rows, tokens), dtype=np.int32)
    compactions: list[int] = []
    snapshots: list[Snapshot] = []
    resident = 0
    for seen in range(1, tokens + 1):
        resident += 1
        if seen < prompt or resident < budget + every:
            continue
        compactions.append(seen)
        there = (evicted == 0) & (np.arange(tokens) < seen)
        scores = {kind: rng.gamma(0.3, size=there.sum()).astype(np.float32) for kind in ("importance", "redundancy")}
        scores["retention"] = scores["importance"] - scores["redundancy"]
        protected = np.broadcast_to(np.arange(tokens) >= seen - 4, there.shape)[there]
        ranked = np.full(there.shape, -np.inf)
        ranked[there] = np.where(protected, np.inf, scores["retention"])
        order = np.argsort(-ranked, axis=1, kind="stable")[:, :budget]
        kept = np.zeros_like(there)
        np.put_along_axis(kept, order, values=True, axis=1)
        evicted[there & ~kept] = len(compactions)
        resident = budget
        snapshots.append(
            Snapshot(
                len(compactions),
                scores["importance"] if "importance" in kinds else None,
                scores["redundancy"] if "redundancy" in kinds else None,
                scores["retention"],
                protected,
            )
        )
    return Recording(
        layers=numbers,
        heads=(heads,) * len(numbers),
        prompt=prompt,
        seen=tokens,
        compactions=np.array(compactions, dtype=np.int32),
        evicted=evicted,
        snapshots=tuple(snapshots),
    )
