"""The scores of all ranks of tensor parallelism, where a decision for one head hangs on heads that lie on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvpolicy.contracts.component import named
from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.contracts.ranks import Ranks
from kvpolicy.errors import UnsupportedError
from kvpolicy.policy.decision import Parts, Ranked, Ranking, Scoring
from kvpolicy.types import Counts


def gathered(parts: Parts, scoring: Scoring, ranks: Ranks) -> Scoring:
    """Return what was scored with the heads of all ranks, `[B, H, N]` of the whole layer and the same on each of them.

    Where every head decides for itself, or all heads are here, it is `scoring` itself and nobody waits for anybody.

    Raises:
        UnsupportedError: heads decide together, and `ranks` does not bring those that are elsewhere.
    """
    together = _together(parts)
    if together is None or all(each.head_span.complete for each in scoring.slots):
        return scoring
    runs = []
    for run in scoring.runs:
        retention, protected, allowed = map(ranks.gather, (run.scored.retention, run.protected, run.allowed))
        span = run.slots.head_span
        if retention.shape[1] != span.total:
            raise UnsupportedError(
                f"layer {run.layers[0]}: {together}, and {span.here} of {span.total} heads are here; give the cache "
                "`ranks` that gather the others, or use `scope: head` with `allocator: uniform`."
            )
        runs.append(run._replace(scored=run.scored._replace(retention=retention), protected=protected, allowed=allowed))
    slots = [replace(each, heads=HeadSpan.whole(each.head_span.total)) for each in scoring.slots]
    return Scoring(runs, slots, scoring.num_layers)


def _together(parts: Parts) -> str | None:
    """Say in which way a decision for one head hangs on others, if it does."""
    selector, allocator = parts.selector, parts.allocator
    if selector.scope != "head":
        return f"{named(selector)} (scope {selector.scope!r}) lets all heads decide together"
    if allocator.counts == "per_head":
        return f"{named(allocator)} splits one budget over all heads"
    return None


def here(
    scoring: Scoring, everywhere: Scoring, shared: Ranking, counts: Sequence[Counts]
) -> tuple[Ranking, list[Counts]]:
    """Return the part of what was decided with all heads that belongs to this rank's heads and slots.

    Args:
        scoring: what was scored here.
        everywhere: what `gathered` made of it.
        shared: what is ranked, over all heads.
        counts: int64 `[B, H]` of the whole layer, one per layer.
    """
    if everywhere is scoring:
        return shared, list(counts)
    runs = []
    for run, ranked in zip(scoring.runs, shared.runs, strict=True):
        span, width = run.slots.head_span, run.allowed.shape[-1]
        runs.append(Ranked(*(span.of(each, 1)[..., :width] for each in ranked)))
    mine = [each.head_span.of(count, 1) for each, count in zip(scoring.slots, counts, strict=True)]
    return Ranking(runs, shared.numbers), mine
