"""Similarity of keys (R-KV)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import RedundancyScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores
from kvpolicy_plugins._rope import NeedsRope, compared_keys


class KeyCosine(RedundancyScorer):
    """Softmax over the entries of each key's mean cosine to the others, with the newest of similar keys spared.

    Cached keys carry their rotary embedding: at the default threshold "similar" also means "not far apart". The cosines
    are exact, but no keys x keys matrix is built (`kvpolicy.ops.redundancy`).
    """

    same_for_layers: ClassVar[bool] = True
    needs = NeedsRope()
    paper: ClassVar[str] = "arXiv:2505.24133"
    comparable_across_heads: ClassVar[bool] = True

    threshold: float = Field(default=0.5, ge=0, le=1)
    """Cosine above which two keys count as similar."""
    beta: int = Field(default=1, ge=0)
    """How many of its newest similar keys each key exempts; 0 for none."""
    spare: Literal["newest", "own"] = "newest"
    """Whose mean an exempted pair leaves: the newest twin's (R-KV's code) or the key's own (eq. 5-6 of the paper)."""
    index_zero: bool = False
    """A key without similar keys exempts the oldest one instead: the accidental sink of R-KV's code."""
    window: int = Field(default=0, ge=0)
    """The newest so many entries take no part; 0 lets all entries take part."""
    rope: Literal["post", "pre"] = "post"
    """Compare the keys as cached (`post`) or with the rotary embedding taken off (`pre`)."""

    def laws_excused(self) -> Mapping[str, str]:
        if self.spare == "own":
            return {"newest_twin_spared": "equations 5 and 6 of the paper spare the keys that have a newer twin"}
        if self.index_zero:
            return {"newest_twin_spared": "the accidental sink of the released code spares the oldest key"}
        return {}

    def score(self, view: CacheView) -> Scores:
        participates = ~view.newest(self.window) if self.window else None
        return ops.redundancy(
            compared_keys(view, self.rope, "redundancy: key_cosine"),
            view.valid,
            participates=participates,
            threshold=self.threshold,
            beta=self.beta,
            spare=self.spare,
            index_zero=self.index_zero,
        )
