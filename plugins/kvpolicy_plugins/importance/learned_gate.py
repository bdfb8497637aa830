"""What a small learned gate says of a token when it enters the cache (TRIM-KV, KVzap)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kvpolicy.contracts.components import ImportanceScorer, NewTokens, SlotState
from kvpolicy.contracts.view import CacheView
from kvpolicy.tables import TableOf, gate_of, load_table
from kvpolicy.types import Scores

_STATE = "learned_gate"
_LEAST = 1e-30


class LearnedGate(ImportanceScorer):
    """The number that a gate of the layer made of the token's hidden state, one for each KV head; the file says which.

    A *score* gate (KVzap, arXiv:2601.07891, section 3) predicts the logarithm of the largest attention that later
    tokens will pay, and its number is the score. A *retention* gate (TRIM-KV, arXiv:2512.03324, section 4) gives the
    logit of ``beta``, and an entry at position `i` is worth ``beta ** (t - i)`` when the query at position `t` asks:
    the score is ``(t - i) * log(beta)``. The gate is applied when a token enters, and its number is kept beside the
    entry; O(N) at a compaction, no queries, no keys.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})
    comparable_across_heads: ClassVar[bool] = True
    comparable_across_layers: ClassVar[bool] = True
    same_for_layers: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2512.03324 (TRIM-KV), arXiv:2601.07891 (KVzap)"

    gate: Annotated[str, TableOf("gates")]
    """Table of kind ``gates``, or a safetensors file that TRIM-KV or KVzap publish: its name, or its path."""
    ahead: int = Field(default=1, ge=0)
    """For retention gates: the query that entries are judged for is the one at position `seen + ahead`; 1 as in the
    code, 0 is the next token."""
    lookahead: int = Field(default=1, ge=1)
    """For retention gates: how many queries from that one on, whose shares are added up; 1 as in the paper."""

    def laws_excused(self) -> Mapping[str, str]:
        excused = {"permuting_entries": "what is left of an entry hangs on its age"}
        return excused if self._retains() else {}

    def slot_state(self) -> tuple[SlotState, ...]:
        return (SlotState(_STATE),)

    def enter(self, tokens: NewTokens) -> Mapping[str, Tensor]:
        table, states = load_table(self.gate, "gates"), tokens.hidden_states
        layer = table.of_layer(tokens.layer_idx, tokens.heads, states.shape[-1], states.device)
        return {_STATE: gate_of(layer, states, table.notes.get("activation", ""))}

    def score(self, view: CacheView) -> Scores:
        said = view.held(_STATE)
        if self._retains():
            said = self._retained(said, view)
        return torch.where(view.valid, said, 0.0)

    def _retains(self) -> bool:
        return load_table(self.gate, "gates").notes["output"] == "retention"

    def _retained(self, logits: Tensor, view: CacheView) -> Tensor:
        """Return the logarithm of what is left of each entry, fp32 `[B, H, N]`."""
        age = (view.seen.to(view.device)[:, None, None] + self.ahead - view.positions).float()
        kept = functional.logsigmoid(logits)
        if self.lookahead == 1:
            return age * kept
        kept = kept.clamp(
            max=-_LEAST
        )  # a beta of 1 in fp32 keeps everything, and the quotient below is then `lookahead`
        return age * kept + (-torch.expm1(kept * self.lookahead)).log() - (-torch.expm1(kept)).log()
