"""The scores of all ranks, for decisions that hang on heads which lie on other ranks, and back to those that are here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.contracts.ranks import Ranks
from kvpolicy.policy.decide import Parts, Ranking, Scoring
from kvpolicy.types import Counts


def crosses_heads(parts: Parts) -> bool:
    """Whether a policy's decision for one head hangs on others: a shared set, or a budget that heads share."""
    return parts.selector.scope != "head" or parts.allocator.counts == "per_head"


def gathered(scoring: Scoring, ranks: Ranks) -> Scoring:
    """Return what was scored on all ranks: `[B, H, N]` of the whole layer, the same on each of them."""
    ranking = Ranking(*(_together(part, ranks) for part in scoring.ranking))
    slots = [replace(each, head_span=HeadSpan.whole(each.head_span.total)) for each in scoring.slots]
    return replace(scoring, ranking=ranking, slots=slots)


def _together(tensors: list[Tensor], ranks: Ranks) -> list[Tensor]:
    """Gather one tensor per layer, in one call where their shapes allow it: a call waits for the slowest rank."""
    if len({each.shape for each in tensors}) == 1 and len({each.device for each in tensors}) == 1:
        return list(ranks.gather(torch.stack(tensors)).unbind(0))
    return [ranks.gather(each) for each in tensors]


def here(scoring: Scoring, shared: Ranking, counts: Sequence[Counts]) -> tuple[Ranking, list[Counts]]:
    """Return the part of a ranking and of counts over all heads that belongs to this rank's heads and slots."""
    spans = [each.head_span for each in scoring.slots]
    widths = [mask.shape[-1] for mask in scoring.ranking.allowed]
    mine = Ranking(
        *(
            [span.of(each, 1)[..., :width] for each, span, width in zip(part, spans, widths, strict=True)]
            for part in shared
        )
    )
    return mine, [span.of(each, 1) for each, span in zip(counts, spans, strict=True)]


