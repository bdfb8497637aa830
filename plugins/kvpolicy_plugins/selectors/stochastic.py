"""A part by score, a part by lot (NACL, VaSE)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from kvpolicy import ops
from kvpolicy.contracts.components import Selector, Slots
from kvpolicy.types import Counts, KeepIndices, Mask, Scores


class Stochastic(Selector):
    """Protected entries, the highest scores, and for the rest of the count a sample of what is left.

    The sample is drawn without replacement with probabilities ``softmax(score / temperature)`` over what is left
    (arXiv:2408.03675), as the highest ``score / temperature + Gumbel noise``; `in_proportion` to the scores themselves
    (arXiv:2606.03928), it is their logarithm that is divided and raised. The noise is a hash of seed,
    layer, head, original position and compaction, so a row draws in a batch what it draws alone; heads or layers that
    share a set share the noise. Equal scores of the first part go to the older entry.
    """

    paper: ClassVar[str] = "arXiv:2408.03675 (NACL), arXiv:2606.03928 (VaSE)"
    laws_not_applicable: ClassVar[Mapping[str, str]] = {
        "highest_scores_stay": "a part is drawn by lot",
        "ties_to_the_oldest": "a part is drawn by lot",
        "permuting_heads": "each head draws its own numbers",
    }

    sampled: float = Field(default=0.3, ge=0, le=1)
    """Share of the unprotected budget that is drawn by lot, rounded down; 0 is `top_k`."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Scores are divided by it: a small one samples nearly by rank, a large one evenly."""
    in_proportion: bool = False
    """Draw in proportion to ``score ** (1 / temperature)``; scores of 0 and below come last, the older first."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Another seed is another sample."""

    def laws_excused(self) -> Mapping[str, str]:
        level = {"constant_ignored": "chances are in proportion to the level of the scores"}
        return {**self.laws_not_applicable, **(level if self.in_proportion else {})}

    def select(self, scores: Scores, counts: Counts, protected: Mask, valid: Mask, slots: Slots) -> KeepIndices:
        candidates = valid & ~protected
        free = counts - protected.sum(-1)
        certain = free - (free * self.sampled).floor().to(torch.int64)
        clean = torch.where(candidates, scores, 0.0)
        leading = candidates & (ops.ranks_in(ops.ordered_by(candidates, clean)) < certain.unsqueeze(-1))
        order = ops.ordered_by(leading, candidates, self._perturbed(clean, candidates, valid, slots))
        return ops.top_k(-ops.ranks_in(order).to(torch.float32), counts, protected, valid, width=slots.width)

    def _perturbed(self, scores: Scores, candidates: Mask, valid: Mask, slots: Slots) -> torch.Tensor:
        head = slots.head_span.numbers(scores.device)[:, None]
        if self.scope != "head":
            head = torch.zeros_like(head)
        position = torch.where(valid, slots.positions, 0)
        compaction = slots.compaction[:, None, None].to(scores.device)
        uniform = ops.counter_uniform(self.seed, slots.layer_idx, head, position, compaction)
        # Multiples of 2^-24 from 0 on; the middle of each step is neither 0 nor 1.
        gumbel = -torch.log(-torch.log(uniform.to(torch.float64) + 2.0**-25))
        _, highest = ops.extremes(scores, candidates)
        if self.in_proportion:
            # From the highest on; where all are 0 nothing is divided, and the older come first.
            share = scores.clamp(min=0).to(torch.float64) / torch.where(highest > 0, highest, 1.0).to(torch.float64)
            return share.log() / self.temperature + gumbel
        return (scores.to(torch.float64) - highest.to(torch.float64)) / self.temperature + gumbel
