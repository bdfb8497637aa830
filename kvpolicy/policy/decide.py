"""The decision of a policy in stages, each a function of what the one before returned: score, share, allocate, choose.

`Policy.decide` runs them. Whoever wants to see or change what passes between two of them (a recorder, a study, a
runtime that gathers the scores of several ranks) calls or wraps the stages; nothing here keeps anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from kvpolicy.contracts.components import (
    AllocationRequest,
    BudgetAllocator,
    ImportanceScorer,
    Mixer,
    Protection,
    RedundancyScorer,
    Selector,
    Slots,
)
from kvpolicy.contracts.view import CacheView
from kvpolicy.errors import BudgetError, ScoreError, UnsupportedError
from kvpolicy.ops.dispatch import using_backend
from kvpolicy.policy.fuse import folded
from kvpolicy.policy.scoring import checked, once
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


class Scored(NamedTuple):
    """The scores of one layer, fp32 `[B, H, N]` each; zeros for the one that the mixer does not use."""

    importance: Scores
    redundancy: Scores
    retention: Scores


class Ranking(NamedTuple):
    """What a selection ranks, one tensor `[B, H, N]` per layer.

    Attributes:
        scores: fp32, higher = keep.
        protected: slots that must stay; allowed ones only.
        allowed: slots that may stay; valid ones only.
    """

    scores: list[Scores]
    protected: list[Mask]
    allowed: list[Mask]


@dataclass(frozen=True)
class Scoring:
    """What the stage `score` returns.

    Attributes:
        scored: of each layer.
        ranking: the same retention scores with the masks, every head by itself.
        slots: what a selector may know of each layer.
        runs: layers that were scored as one view, in order: what a selector may know of them together, and how many
            they are.
        num_layers: layers of the whole model.
    """

    scored: list[Scored]
    ranking: Ranking
    slots: list[Slots]
    runs: list[tuple[Slots, int]]
    num_layers: int


@dataclass(frozen=True)
class Decision:
    """What a policy decided, and on what grounds; one entry per layer in every list.

    Attributes:
        scored: importance, redundancy and retention.
        shared: what was ranked: the same for all heads (and layers) that share a set.
        counts: int64 `[B, H]`, what the allocator gave.
        kept: the slots that stay, strictly increasing.
    """

    scored: list[Scored]
    shared: Ranking
    counts: list[Counts]
    kept: list[KeepIndices]


def decide(parts: Parts, views: Sequence[CacheView], budget: Sequence[int]) -> Decision:
    """Decide for all layers at once which slots stay; see `Policy.decide`."""
    scoring = score(parts, views)
    shared = share(parts.selector, scoring)
    rows = torch.tensor(list(budget), dtype=torch.int64)
    _check(parts, scoring, shared, rows)
    counts = allocate(parts.allocator, scoring, shared, rows)
    kept = choose(parts, scoring, shared, counts)
    return Decision(scoring.scored, shared, counts, kept)


# -- score ------------------------------------------------------------------------------------------------------------


def score(parts: Parts, views: Sequence[CacheView]) -> Scoring:
    """Score every layer; layers that may be folded (see `kvpolicy.policy.fuse`) are scored together.

    Args:
        parts: the policy.
        views: one view per layer, all of the same rows. Views that a runtime makes on the way (no list) are taken one
            after the other, and never all at once.

    Raises:
        ScoreError: a scorer or the mixer returned a wrong shape or dtype.
    """
    scored: list[Scored] = []
    ranking = Ranking([], [], [])
    slots: list[Slots] = []
    runs: list[tuple[Slots, int]] = []
    num_layers = 0
    for view, layers_in_it in folded(views) if folds(parts) and isinstance(views, list) else ((v, 1) for v in views):
        one = scores(parts, view)
        for mine, part in zip(ranking, (one.retention, *masks(parts, view)), strict=True):
            mine.extend(part.unflatten(0, (layers_in_it, -1)).unbind(0))
        each = (part.unflatten(0, (layers_in_it, -1)).unbind(0) for part in one)
        scored += map(Scored, *each)
        slots += [Slots.of(view)] if layers_in_it == 1 else map(Slots.of, views[len(slots) : len(scored)])
        runs.append((Slots.of(view), layers_in_it))
        num_layers = view.num_layers
    return Scoring(scored, ranking, slots, runs, num_layers)


def folds(parts: Parts) -> bool:
    """Whether several layers can be scored as one."""
    scoring = [parts.mixer, *parts.protections]
    scoring += [parts.importance] if parts.mixer.uses_importance else []
    scoring += [parts.redundancy] if parts.mixer.uses_redundancy else []
    return all(member.same_for_layers for part in scoring for member in part.members())


def scores(parts: Parts, view: CacheView) -> Scored:
    """Return the retention score of one view and what it is mixed from; raises ScoreError on a wrong shape or dtype."""
    zeros = torch.zeros((), dtype=torch.float32, device=view.device).expand(view.shape)
    both = parts.mixer.uses_importance and parts.mixer.uses_redundancy
    with using_backend(parts.backend, shared=both):
        importance = once(parts.importance, view) if parts.mixer.uses_importance else zeros
        redundancy = once(parts.redundancy, view) if parts.mixer.uses_redundancy else zeros
    return Scored(importance, redundancy, checked(parts.mixer.mix(importance, redundancy, view), view, parts.mixer))


def masks(parts: Parts, view: CacheView) -> tuple[Mask, Mask]:
    """Return (protected, allowed) of one view, bool `[B, H, N]`; what is not valid is never allowed."""
    protected = torch.zeros(view.shape, dtype=torch.bool, device=view.device)
    allowed = view.valid
    for protection in parts.protections:
        mask = protection.mask(view)
        if protection.effect == "keep":
            protected = protected | mask
        else:
            allowed = allowed & ~mask
    return protected & allowed, allowed


# -- share ------------------------------------------------------------------------------------------------------------


def share(selector: Selector, scoring: Scoring) -> Ranking:
    """Reduce what heads (scope `layer`) or heads and layers (scope `model`) decide together; the same for each of them.

    A slot is protected where one of them protects it, and allowed where all of them allow it.

    Raises:
        UnsupportedError: heads decide together, and some of them are not here.
    """
    scope, how = selector.scope, selector.reduce
    if scope == "head":
        return scoring.ranking
    _all_here(scoring, f"{type(selector).__name__} (scope {scope!r}) lets all heads decide together")
    scores, protected, allowed = scoring.ranking
    heads = [s.shape[1] for s in scores]
    devices = [s.device for s in scores]
    scores = [_reduce(s.masked_fill(~a, 0.0), 1, how) for s, a in zip(scores, allowed, strict=True)]
    protected = [p.any(1) for p in protected]
    allowed = [a.all(1) for a in allowed]
    if scope == "model":
        home = devices[0]
        one = _reduce(torch.stack([s.to(home) for s in scores]), 0, how)
        kept = torch.stack([p.to(home) for p in protected]).any(0)
        may = torch.stack([a.to(home) for a in allowed]).all(0)
        scores = [one.to(d) for d in devices]
        protected, allowed = [kept.to(d) for d in devices], [may.to(d) for d in devices]
    return Ranking(
        [s.unsqueeze(1).expand(-1, h, -1) for s, h in zip(scores, heads, strict=True)],
        [p.unsqueeze(1).expand(-1, h, -1) for p, h in zip(protected, heads, strict=True)],
        [a.unsqueeze(1).expand(-1, h, -1) for a, h in zip(allowed, heads, strict=True)],
    )


def _reduce(scores: Tensor, dim: int, how: str) -> Tensor:
    if how == "mean":
        return scores.mean(dim)
    return scores.sum(dim) if how == "sum" else scores.amax(dim)


# -- allocate ---------------------------------------------------------------------------------------------------------


def allocate(allocator: BudgetAllocator, scoring: Scoring, shared: Ranking, rows: Tensor) -> list[Counts]:
    """Return int64 `[B, H]` per layer, the entries that each head keeps; `rows` int64 `[B]` are the rows' budgets.

    Raises:
        UnsupportedError: heads share a budget, and some of them are not here.
    """
    if allocator.counts == "per_head":
        _all_here(scoring, f"{type(allocator).__name__} splits one budget over all heads")
    return allocator.allocate(
        AllocationRequest(
            budget=rows.to(shared.scores[0].device),
            valid=[mask.sum(-1) for mask in shared.allowed],
            protected=[mask.sum(-1) for mask in shared.protected],
            scores=shared.scores,
            masks=shared.allowed,
            layers=[each.layer_idx for each in scoring.slots],
            num_layers=scoring.num_layers,
            protected_masks=shared.protected,
            heads=[each.head_span for each in scoring.slots],
        )
    )


def _all_here(scoring: Scoring, why: str) -> None:
    """Refuse to decide for a part of the heads what hangs on all of them."""
    for each in scoring.slots:
        heads = each.head_span
        if not heads.complete:
            raise UnsupportedError(
                f"layer {each.layer_idx}: {why}, and {heads.here} of {heads.total} heads are here; gather the scores "
                "of all heads first, or use `scope: head` with `allocator: uniform`."
            )


# -- choose -----------------------------------------------------------------------------------------------------------


def choose(parts: Parts, scoring: Scoring, shared: Ranking, counts: list[Counts]) -> list[KeepIndices]:
    """Return the slots that stay of each layer, as many as `counts` say."""
    selector, slots = parts.selector, scoring.slots
    if selector.scope == "model":
        slots = [replace(each, layer_idx=slots[0].layer_idx) for each in slots]
    alike = parts.counts == "equal" and all(member.same_for_layers for member in selector.members())
    asked = list(zip(shared.scores, counts, shared.protected, shared.allowed, strict=True))
    kept: list[KeepIndices] = []
    with using_backend(parts.backend):
        for whole, number in scoring.runs if alike else [(each, 1) for each in slots]:
            some = asked[len(kept) : len(kept) + number]
            if number == 1:
                kept.append(selector.select(*some[0], slots[len(kept)]))
                continue
            score, count, keep, may = (torch.cat(each) for each in zip(*some, strict=True))
            one = selector.select(score, count, keep, may, whole)
            kept += map(KeepIndices, *(each.unflatten(0, (number, -1)).unbind(0) for each in one))
    return kept


def _check(parts: Parts, scoring: Scoring, shared: Ranking, rows: Tensor) -> None:
    """Refuse NaN, infinities and too small budgets, with one read from the device per compaction."""
    facts = [
        torch.stack(
            [
                (~torch.isfinite(s.masked_fill(~a, 0.0))).any().to(torch.int64),
                (p.sum(-1) - rows.to(p.device)[:, None]).max(),
                p.sum(-1).max(),
            ]
        ).to("cpu", non_blocking=False)
        for s, p, a in zip(*shared, strict=True)
    ]
    for each, (bad, excess, most) in zip(scoring.slots, torch.stack(facts).tolist(), strict=True):
        if bad:
            raise ScoreError(
                f"policy {parts.name!r}: the retention scores of layer {each.layer_idx} are not finite; "
                "look for NaN or infinity in that layer's keys and values, or in the scorer."
            )
        if excess > 0:
            raise BudgetError(
                f"budget: {int(rows.min())} entries per head are fewer than the {most} that policy {parts.name!r} "
                "protects; raise the budget or protect less (a pinned prompt counts inside the budget)."
            )
