"""Keys unlike the others matter (KeyDiff)."""

from __future__ import annotations

from typing import ClassVar

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Scores


class KeyDiff(ImportanceScorer):
    """Minus the cosine of each key, as cached, to the mean of all keys of its head, each brought to length 1.

    ``-cos(k_i, mean_j k_j/|k_j|)``, within [-1, 1]; 0 for a key of zeros. O(N D), no queries.
    """

    paper: ClassVar[str] = "arXiv:2504.15364"
    same_for_layers: ClassVar[bool] = True

    def score(self, view: CacheView) -> Scores:
        return -ops.mean_key_similarity(view.keys, view.valid, unit_mean=True)
