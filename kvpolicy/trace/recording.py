"""What was recorded of one text: plain arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Int32
    from numpy import ndarray as Array


@dataclass(frozen=True)
class Snapshot:
    """The scores of one compaction, one number for every entry that a head held when it was decided.

    Entries lie one head after the other, in order of position; `Recording.candidates` says which they are.

    Attributes:
        compaction: its number, from 1.
        importance: fp32 `[M]`, or None when the policy does not use it.
        redundancy: fp32 `[M]`, likewise.
        retention: fp32 `[M]`, what the selection ranked: heads (or layers) that share a set share the number.
        protected: bool `[M]`, kept whatever the score.
    """

    compaction: int
    importance: Float32[Array, " M"] | None
    redundancy: Float32[Array, " M"] | None
    retention: Float32[Array, " M"]
    protected: Bool[Array, " M"]


@dataclass(frozen=True)
class Recording:
    """Every compaction of one text under one policy.

    A *head* is a KV head of one layer; the `R` heads are numbered layer after layer. Position = index of the token.

    Attributes:
        layers: the layers that the policy works on, as transformers counts.
        heads: KV heads of each of them.
        prompt: tokens of the prompt.
        seen: tokens that went into the cache.
        compactions: int32 `[C]`, tokens seen at each compaction.
        evicted: int32 `[R, seen]`, the number of the compaction that evicted the entry, from 1; 0 for what is held.
        snapshots: scores of some compactions, in order.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    prompt: int
    seen: int
    compactions: Int32[Array, " C"]
    evicted: Int32[Array, "R seen"]
    snapshots: tuple[Snapshot, ...]

    def held(self, tokens: int) -> Bool[Array, "R seen"]:
        """Return which entries each head holds when so many tokens have been seen and what was due then has run."""
        last = np.searchsorted(self.compactions, tokens, side="right")
        held: Array = (np.arange(self.seen) < tokens) & ((self.evicted == 0) | (self.evicted > last))
        return held

    def candidates(self, compaction: int) -> Bool[Array, "R seen"]:
        """Return which entries each head held when a compaction, from 1, was decided."""
        there = np.arange(self.seen) < self.compactions[compaction - 1]
        candidates: Array = there & ((self.evicted == 0) | (self.evicted >= compaction))
        return candidates

    def kept_for(self) -> Int32[Array, "R seen"]:
        """Return for how many tokens each entry was held, itself counted; to the end for what was never evicted."""
        ends = np.append(np.int32(self.seen), self.compactions).astype(np.int32)
        spans: Array = ends[self.evicted] - np.arange(self.seen, dtype=np.int32)
        return spans

    def scores(self, snapshot: Snapshot, kind: str) -> Float32[Array, "R seen"]:
        """Return one kind of a snapshot's scores (or ``protected``) by head and position, NaN where there is none.

        Raises:
            KeyError: the policy uses no such score.
        """
        values = getattr(snapshot, kind)
        if values is None:
            raise KeyError(kind)
        result = np.full(self.evicted.shape, np.nan, dtype=np.float32)
        result[self.candidates(snapshot.compaction)] = values
        return result
