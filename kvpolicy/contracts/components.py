"""The contracts: eight kinds of components, each a frozen, strict pydantic model with one abstract method.

A component is its validated parameters and one pure function. It never changes what it is given, never counts steps and
holds no tensors; what it must remember lives in *slot state* that the engine moves together with the cache's slots.
"""

from __future__ import annotations

import reprlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Int32
from torch import Tensor

from kvpolicy.contracts.component import Component
from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.contracts.slot_state import NewTokens, SlotState
from kvpolicy.contracts.trigger import Counters, Trigger
from kvpolicy.contracts.view import CacheView
from kvpolicy.types import Counts, KeepIndices, Lengths, Mask, Positions, Queries, Scores, Weights

__all__ = [
    "KINDS",
    "NEEDS",
    "AllocationRequest",
    "BudgetAllocator",
    "Component",
    "Counters",
    "ImportanceScorer",
    "Mixer",
    "NewTokens",
    "PostOperation",
    "Protection",
    "RedundancyScorer",
    "Selector",
    "SlotState",
    "Slots",
    "Trigger",
    "kind_of",
]

NEEDS: Mapping[str, str] = {
    "queries": "the queries of the last steps (the field `observe` says how many)",
    "attention": "the attention weights of every query, fed to `observe_attention`",
    "query_stream": "every query, fed to `observe_queries`",
    "hidden_states": "what each layer's attention reads of every new token, fed to `enter`",
    "rope": "the rotary embedding, to un-rotate or re-rotate keys",
    "weights": "the output projection of the attention, `extras['output_projection']`",
    "query_statistics": "mean and covariance of the un-rotated queries so far, `extras['query_mean']` and its siblings",
    "modality": "a mask of image tokens, `extras['modality']`",
}
"""Everything a component can ask a runtime for, beyond keys, values, positions and validity."""


class ImportanceScorer(Component):
    """Says how much each entry matters. Higher = keep.

    Class attributes:
        comparable_across_heads: numbers of different KV heads of one layer may be ranked together.
        comparable_across_layers: likewise for layers.
        rounded: scores are computed in floating point, so that a policy takes those for equal which differ by no more
            than rounding (a share of 4e-6, `kvpolicy.ops.levelled`). False for whole numbers and hashes, whose every
            difference means something.
        constant: every entry gets the same number, so that nothing is ranked.
    """

    comparable_across_heads: ClassVar[bool] = False
    comparable_across_layers: ClassVar[bool] = False
    rounded: ClassVar[bool] = True
    constant: ClassVar[bool] = False

    @abstractmethod
    def score(self, view: CacheView) -> Scores:
        """Return fp32 `[B, H, N]` over all slots, finite where `view.valid`; higher = keep."""

    def observe_attention(self, view: CacheView, weights: Weights) -> Mapping[str, Tensor]:
        """Fold the attention of some queries into the slot state; called for every query exactly once.

        Only for components that declare the need ``attention``. The engine feeds queries in order, in blocks, so that
        nothing of size tokens x tokens ever exists.

        Args:
            view: the cache as those queries saw it, with the present slot state in `view.state`; `query_positions` and
                `query_valid` `[B, Q]` are those of the block, and there are no `queries`.
            weights: fp32 `[B, H, G, Q, N]`, softmax weights of `Q` consecutive queries; 0 for slots a query cannot see.

        Returns:
            The new slot state by name, `[B, H, N]` each.
        """
        raise TypeError(f"{type(self).__name__} needs no attention and must not be asked to observe it.")

    def observe_queries(
        self, view: CacheView, queries: Queries, positions: Int32[Tensor, "B Q"], valid: Bool[Tensor, "B Q"]
    ) -> Mapping[str, Tensor]:
        """Fold some queries into the slot state; called for every query exactly once, in order, in blocks.

        Only for components that declare the need ``query_stream``. All keys of the queries' forward pass are in the
        view already, those of later tokens too.

        Args:
            view: the cache, with the present slot state in `view.state`.
            queries: `[B, H, G, Q, D]`, rotated as the keys are.
            positions: int32 `[B, Q]`, original positions.
            valid: bool `[B, Q]`, False for padding.

        Returns:
            The new slot state by name, `[B, H, N]` each.
        """
        raise TypeError(f"{type(self).__name__} needs no queries and must not be asked to observe them.")


class RedundancyScorer(Component):
    """Says how replaceable each entry is by another one. Higher = more replaceable.

    Class attributes are those of `ImportanceScorer`.
    """

    comparable_across_heads: ClassVar[bool] = False
    comparable_across_layers: ClassVar[bool] = False
    rounded: ClassVar[bool] = True
    constant: ClassVar[bool] = False

    @abstractmethod
    def score(self, view: CacheView) -> Scores:
        """Return fp32 `[B, H, N]` over all slots, finite where `view.valid`; higher = more replaceable."""


class Mixer(Component):
    """Combines importance and redundancy into one retention score.

    Class attributes:
        uses_importance: False when the result does not depend on the importance.
        uses_redundancy: False when the result does not depend on the redundancy.
        normalisation: how the two are made commensurable: none, max, min-max, mean-matching, z-score or rank.
        keeps_comparability: the result is comparable across heads or layers whenever its inputs are.
    """

    uses_importance: ClassVar[bool] = True
    uses_redundancy: ClassVar[bool] = True
    normalisation: ClassVar[Literal["none", "max", "min-max", "mean-matching", "z-score", "rank"]] = "none"
    keeps_comparability: ClassVar[bool] = True

    @abstractmethod
    def mix(self, importance: Scores, redundancy: Scores, view: CacheView) -> Scores:
        """Return the retention score, fp32 `[B, H, N]`; higher = keep."""


@dataclass(frozen=True)
class AllocationRequest:
    """What an allocator decides on.

    Attributes:
        budget: int64 `[B]`, entries per KV head and layer on average, protected ones included.
        valid: int64 `[L][B, H]`, how many valid entries each layer's heads hold.
        protected: int64 `[L][B, H]`, how many of them are protected.
        scores: retention scores `[L][B, H, N]`, protected slots included.
        masks: validity `[L][B, H, N]` of the scores.
        layers: transformers' layer index of each of the `L` entries.
        num_layers: layers of the whole model.
        protected_masks: the protected slots `[L][B, H, N]`, valid ones only.
        heads: `[L]`, which of the model's KV heads each layer's `H` heads are; empty for all of them.
    """

    budget: Tensor
    valid: list[Tensor]
    protected: list[Tensor]
    scores: list[Scores]
    masks: list[Mask]
    layers: list[int]
    num_layers: int
    protected_masks: list[Mask]
    heads: Sequence[HeadSpan] = ()

    @property
    def head_spans(self) -> list[HeadSpan]:
        """Which of the model's KV heads each layer's heads are."""
        return list(self.heads) or [HeadSpan.whole(valid.shape[-1]) for valid in self.valid]


class BudgetAllocator(Component):
    """Splits the budget over layers and KV heads; integers that sum exactly to it.

    Class attributes:
        scores_needed: ``none``, ``layer`` (one layer's scores, heads pooled) or ``model`` (all layers' scores, pooled).
        counts: ``equal`` (every head and layer the same), ``per_layer`` or ``per_head``.

    An allocator that makes pooled scores comparable itself says so in `normalises`.
    """

    scores_needed: ClassVar[Literal["none", "layer", "model"]] = "none"
    counts: ClassVar[Literal["equal", "per_layer", "per_head"]] = "per_head"

    @property
    def normalises(self) -> bool:
        """Whether scores that are not comparable across heads (or layers) may be pooled all the same."""
        return False

    @abstractmethod
    def allocate(self, request: AllocationRequest) -> list[Counts]:
        """Return int64 `[B, H]` per layer with `protected <= count <= valid` and an exact total.

        The total of a row is `min(budget * L * H, all valid entries of the row)`.
        """


class Protection(Component):
    """Names slots that must stay, or must go, whatever their score.

    Class attributes:
        effect: ``keep`` or ``drop``.
        only_padding: a promise of a protection that drops: it marks no slot with a token, so that every head still
            holds its share of the budget. False is always right.
        same_for_heads: a promise that heads and layers which hold the same positions protect the same ones, so that a
            kept set that they share holds no more than `reserved`. False is always right.
    """

    effect: ClassVar[Literal["keep", "drop"]] = "keep"
    only_padding: ClassVar[bool] = False
    same_for_heads: ClassVar[bool] = False

    @abstractmethod
    def mask(self, view: CacheView) -> Mask:
        """Return bool `[B, H, N]`, True for the slots that must stay (or go)."""

    def reserved(self, prompt_length: int = 0) -> int:
        """How many entries per head this keeps in a long row with that prompt; 0 for ``drop``.

        With `prompt_length` 0 it is what every row keeps; a budget below the sum is refused when a policy is made.
        """
        return 0


@dataclass(frozen=True)
class Slots:
    """What a selector may know about the slots beside their scores.

    Attributes:
        positions: int32 `[B, H, N]`, original positions, increasing over the valid slots.
        prompt_length: int `[B]`, tokens of the prompt.
        seen: int `[B]`, tokens seen so far.
        compaction: int `[B]`, how many compactions the row has had (the counter for random numbers).
        layer_idx: index of the layer; of the first one when all layers share a set.
        heads: which of the model's KV heads these are; None for all of them.
        width: no head keeps more entries than this; for `ops.top_k`, which would ask the device otherwise. None where
            it is not known.
    """

    positions: Positions
    prompt_length: Lengths
    seen: Lengths
    compaction: Lengths
    layer_idx: int
    heads: HeadSpan | None = None
    width: int | None = None

    @property
    def head_span(self) -> HeadSpan:
        """Which of the model's KV heads the `H` heads are."""
        return HeadSpan.whole(self.positions.shape[1]) if self.heads is None else self.heads

    @staticmethod
    def of(view: CacheView) -> Slots:
        """Read them off a view."""
        return Slots(view.positions, view.prompt_length, view.seen, view.compaction, view.layer_idx, view.heads)


class Selector(Component):
    """Turns scores and counts into slots.

    Class attributes:
        exact: the selector keeps exactly `counts`; False when these are upper limits (thresholds).
    """

    exact: ClassVar[bool] = True

    scope: Literal["head", "layer", "model"] = "head"
    """`head`: each KV head keeps its own set; `layer`: all heads of a layer share one; `model`: all layers do."""
    reduce: Literal["mean", "sum", "max"] = "mean"
    """How scores are reduced over the heads (and layers) that share one set."""

    @abstractmethod
    def select(self, scores: Scores, counts: Counts, protected: Mask, valid: Mask, slots: Slots) -> KeepIndices:
        """Return strictly increasing slot indices, exactly `counts[b, h]` of them, for each head.

        A selector that is not `exact` may return fewer, but never fewer than are protected.

        Args:
            scores: retention, fp32 `[B, H, N]`; higher = keep.
            counts: int64 `[B, H]`, `protected.sum(-1) <= counts <= valid.sum(-1)`.
            protected: bool `[B, H, N]`, slots that must be among the kept ones.
            valid: bool `[B, H, N]`, slots that may be kept. Ties go to the lowest slot.
            slots: positions and counters. What heads (or layers) share is the same for all of them, scores too.
        """


class PostOperation(Component):
    """Changes what is kept after the selection.

    Class attributes:
        changes: what it changes: ``positions``, ``values`` or ``keys``.
    """

    changes: ClassVar[Literal["positions", "values", "keys"]] = "values"

    @abstractmethod
    def apply(self, view: CacheView, kept: KeepIndices) -> Mapping[str, Tensor]:
        """Return replacements for the whole layer, over all `N` slots, before they are gathered.

        Keys of the mapping: ``keys`` `[B, H, N, D]`, ``values`` `[B, H, N, Dv]`, ``rope_positions`` int32 `[B, H, N]`.
        """


KINDS: Mapping[str, type[Component]] = {
    "importance": ImportanceScorer,
    "redundancy": RedundancyScorer,
    "mixer": Mixer,
    "allocator": BudgetAllocator,
    "protection": Protection,
    "selector": Selector,
    "trigger": Trigger,
    "post": PostOperation,
}
"""Kind name -> base class, in the order of the pipeline."""


def kind_of(component: type[Any]) -> str:
    """Return the kind name of a component class; raises TypeError if it is not one."""
    for name, base in KINDS.items():
        if isinstance(component, type) and issubclass(component, base):
            return name
    bases = ", ".join(base.__name__ for base in KINDS.values())
    raise TypeError(f"{reprlib.repr(component)} is not a component: derive it from one of {bases}.")
