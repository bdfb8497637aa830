"""Asking a scorer, once for each view."""

from __future__ import annotations

from kvpolicy.contracts.components import ImportanceScorer, RedundancyScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.policy import checks
from kvpolicy.types import Scores


def once(scorer: ImportanceScorer | RedundancyScorer, view: CacheView) -> Scores:
    """Return the scorer's scores of a view, fp32 `[B, H, N]`, computed once for that view.

    A scorer that is made of others asks them this way: one that is equal to the policy's importance costs nothing then.

    Raises:
        ScoreError: the scorer returned another shape, dtype or device.
    """
    # Compared and not hashed: a field may be a list.
    for other, known in view.memo:
        if other == scorer:
            scores: Scores = known
            return scores
    made = checks.scores(scorer.score(view), view, scorer)
    view.memo.append((scorer, made))
    return made
