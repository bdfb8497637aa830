"""Attention within chunks that look ahead (Compactor)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Int32
from pydantic import Field
from torch import Tensor

from kvpolicy import ops
from kvpolicy.contracts.components import ImportanceScorer, SlotState
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Mask, Queries, Scores

_STATE = "non_causal"


class NonCausal(ImportanceScorer):
    """Attention that an entry gets from all queries of its chunk, later and earlier ones, times its value's length.

    The row is cut into chunks of `chunk` tokens behind the first `sinks`. Each query's softmax runs over the keys of
    its chunk; the weights are summed over queries, averaged over the group, multiplied by ``|v_i|`` and averaged over
    `smooth` neighbours (section 3.2). A chunk must be read in one forward pass: keys that come in a later one are not
    seen by the queries before it. O(N chunk D), fed to `observe_queries` in blocks.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"query_stream"})
    paper: ClassVar[str] = "arXiv:2507.08143"
    same_for_layers: ClassVar[bool] = True
    phases: ClassVar[frozenset[str]] = frozenset({"prefill"})
    whole_prompt: ClassVar[bool] = True
    comparable_across_heads: ClassVar[bool] = True
    laws_not_applicable: ClassVar[Mapping[str, str]] = {"permuting_entries": "chunks and sinks are named by position"}

    chunk: int = Field(default=256, ge=1)
    """Tokens per chunk."""
    sinks: int = Field(default=8, ge=0)
    """First positions of the row that take no part; they get the largest score of their head."""
    smooth: int = Field(default=3, ge=1)
    """Entries per smoothing window, 1 for none; the window is divided by its size at the edges too."""
    scaled: bool = False
    """Multiply the logits by the model's factor; the authors' code does not, which sharpens the softmax."""

    def slot_state(self) -> tuple[SlotState, ...]:
        return (SlotState(_STATE),)

    def observe_queries(
        self, view: CacheView, queries: Queries, positions: Int32[Tensor, "B Q"], valid: Bool[Tensor, "B Q"]
    ) -> Mapping[str, Tensor]:
        # Tokens behind the prompt take no part: whether they are there already depends on when queries are fed.
        prompt = view.prompt_length[:, None]
        asked = valid & (positions >= self.sinks) & (positions < prompt)
        chunks = ((positions - self.sinks) // self.chunk).masked_fill(~asked, -1)
        first = chunks.masked_fill(~asked, torch.iinfo(torch.int32).max).amin(dim=1)[:, None, None]
        last = chunks.amax(dim=1)[:, None, None]
        own = (view.positions - self.sinks) // self.chunk
        near = view.valid & (view.positions >= self.sinks) & (own >= first) & (own <= last)
        near = near & (view.positions < prompt.unsqueeze(-1))
        # The block's queries follow each other, so their chunks hold no more entries than this.
        width = min(view.shape[2], queries.shape[3] + 2 * self.chunk)
        keys, places = (ops.pack(x, near)[:, :, :width] for x in (view.keys, own))
        held = torch.arange(width, device=view.device) < near.sum(dim=-1, keepdim=True)
        same = held.unsqueeze(2) & (places.unsqueeze(2) == chunks[:, None, :, None])
        logits = torch.einsum("bhgqd,bhnd->bhgqn", queries.float(), keys.float())
        weights = ops.masked_softmax(logits * view.scale if self.scaled else logits, same.unsqueeze(2))
        received = torch.nn.functional.pad(weights.sum(dim=3).mean(dim=2), (0, view.shape[2] - width))
        return {_STATE: view.held(_STATE) + ops.unpack(received, near)}

    def score(self, view: CacheView) -> Scores:
        candidates = view.valid & (view.positions >= self.sinks)
        scores = ops.smooth_scores(self._weighted(view, candidates), candidates, self.smooth, "mean_zero_padded")
        return torch.where(view.valid & ~candidates, scores.amax(dim=-1, keepdim=True), scores)

    @staticmethod
    def _weighted(view: CacheView, candidates: Mask) -> Scores:
        length = ops.lengths(view.values)
        return torch.where(candidates, view.held(_STATE) * length, 0.0)
