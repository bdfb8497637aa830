"""What passes between the stages of a decision (`kvpolicy.policy.decide`), and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from kvpolicy.contracts.components import (
    BudgetAllocator,
    Component,
    ImportanceScorer,
    Mixer,
    Protection,
    RedundancyScorer,
    Selector,
    Slots,
)
from kvpolicy.types import Counts, KeepIndices, Mask, Scores


class Parts(Protocol):
    """What a decision needs of a policy."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def importance(self) -> ImportanceScorer:
        """How much each entry matters."""

    @property
    def redundancy(self) -> RedundancyScorer:
        """How replaceable each entry is."""

    @property
    def mixer(self) -> Mixer:
        """How the two become one score."""

    @property
    def protections(self) -> tuple[Protection, ...]:
        """What must stay, or go."""

    @property
    def allocator(self) -> BudgetAllocator:
        """How the budget is split."""

    @property
    def selector(self) -> Selector:
        """Scores and counts to slots."""

    @property
    def backend(self) -> str:
        """Which implementation of the operations runs."""

    @property
    def counts(self) -> Literal["equal", "per_layer", "per_head"]:
        """Whether every head of every layer keeps as many."""

    @property
    def remembering(self) -> tuple[Component, ...]:
        """The components that remember something at a compaction."""


class Scored(NamedTuple):
    """The scores of one layer, fp32 `[B, H, N]` each; zeros for the one that the mixer does not use."""

    importance: Scores
    redundancy: Scores
    retention: Scores


class ScoredRun(NamedTuple):
    """Layers that were scored as one view with `l * B` rows, the layers one after the other; usually one layer.

    Attributes:
        layers: their indices.
        slots: what a selector may know of them together.
        scored: fp32 `[l * B, H, N]` each.
        protected, allowed: bool `[l * B, H, N]`, slots that must and that may stay; the former among the latter.
    """

    layers: tuple[int, ...]
    slots: Slots
    scored: Scored
    protected: Mask
    allowed: Mask


class Ranked(NamedTuple):
    """What a selection ranks of one run, `[l * B, H, N]` each: fp32 scores, and what must and may stay."""

    scores: Scores
    protected: Mask
    allowed: Mask


@dataclass(frozen=True)
class Scoring:
    """What the stage `score` returns.

    Attributes:
        runs: layers that were scored together, in order.
        slots: what a selector may know of each layer.
        num_layers: layers of the whole model.
    """

    runs: list[ScoredRun]
    slots: list[Slots]
    num_layers: int

    @cached_property
    def scored(self) -> list[Scored]:
        """The scores of each layer."""
        parts = [[apart(one, len(run.layers)) for one in run.scored] for run in self.runs]
        return [Scored(*each) for run in parts for each in zip(*run, strict=True)]


@dataclass(frozen=True)
class Ranking:
    """What the stage `share` returns: what the selection ranks, the same for all heads that share a set.

    Attributes:
        runs: as they were scored.
        numbers: how many layers each of them has.
    """

    runs: list[Ranked]
    numbers: list[int]

    @cached_property
    def scores(self) -> list[Scores]:
        """Fp32 `[B, H, N]` of each layer; higher = keep."""
        return self._layers(0)

    @cached_property
    def protected(self) -> list[Mask]:
        """Bool `[B, H, N]` of each layer: slots that must stay."""
        return self._layers(1)

    @cached_property
    def allowed(self) -> list[Mask]:
        """Bool `[B, H, N]` of each layer: slots that may stay."""
        return self._layers(2)

    def _layers(self, which: int) -> list[Tensor]:
        return [t for run, n in zip(self.runs, self.numbers, strict=True) for t in apart(run[which], n)]


@dataclass(frozen=True)
class Decision:
    """What a policy decided, and on what grounds; one entry per layer in every list.

    Attributes:
        scored: importance, redundancy and retention.
        shared: what was ranked: the same for all heads (and layers) that share a set.
        counts: int64 `[B, H]`, what the allocator gave.
        kept: the slots that stay, strictly increasing.
        lengths: int64 `[B, H]` on the CPU, how many they are; they came with the one read of the decision.
    """

    scored: list[Scored]
    shared: Ranking
    counts: list[Counts]
    kept: list[KeepIndices]
    lengths: list[Tensor]


def apart(tensor: Tensor, layers: int) -> Sequence[Tensor]:
    """Return the layers of a run, `[B, ...]` each."""
    return tensor.unflatten(0, (layers, -1)).unbind(0) if layers > 1 else (tensor,)
