"""Asking a scorer, once for each view."""

from __future__ import annotations

from kvpolicy.contracts.components import ImportanceScorer, RedundancyScorer
from kvpolicy.contracts.view import CacheView
from kvpolicy.ops.normalisation import levelled
from kvpolicy.policy import checks
from kvpolicy.types import Scores


def once(scorer: ImportanceScorer | RedundancyScorer, view: CacheView) -> Scores:
    """Return the scorer's scores of a view, fp32 `[B, H, N]`, computed once for that view.

    A scorer that is made of others asks them this way: one that is equal to the policy's importance costs nothing then.

    Scores that differ by no more than rounding come out equal (`kvpolicy.ops.levelled`). The same token often has the
    same score but for rounding (a norm in the first layer, where nothing else tells entries apart), and processors,
    backends and sizes of a batch round differently. It is done here, where a score is made, because here rounding is a
    share of the score: a mixer's difference of two scores may be smaller than the rounding of both. All that follows
    is the same function of the same numbers for both entries, so ranks, thresholds and selections see a tie.

    Raises:
        ScoreError: the scorer returned another shape, dtype or device.
    """
    # Compared and not hashed: a field may be a list.
    for other, known in view.memo:
        if other == scorer:
            scores: Scores = known
            return scores
    made = checks.scores(scorer.score(view), view, scorer)
    if scorer.rounded:
        made = levelled(made, view.valid)
    view.memo.append((scorer, made))
    return made
