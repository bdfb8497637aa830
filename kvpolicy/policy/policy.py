"""A policy: a validated composition of components, and the pure function from views to kept slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvpolicy.contracts.budget import Budget
from kvpolicy.contracts.components import (
    AllocationRequest,
    BudgetAllocator,
    Component,
    ImportanceScorer,
    Mixer,
    PostOperation,
    Protection,
    RedundancyScorer,
    Selector,
    Slots,
    SlotState,
    Trigger,
)
from kvpolicy.contracts.view import CacheView
from kvpolicy.errors import BudgetError, ScoreError, SpecError
from kvpolicy.ops.dispatch import using_backend
from kvpolicy.policy.fuse import folded
from kvpolicy.policy.scoring import checked, once
from kvpolicy.types import KeepIndices, Mask, Scores

Phase = Literal["prefill", "decode", "both"]
Backend = Literal["auto", "torch", "triton"]


class Scored(NamedTuple):
    """The scores of one layer, fp32 `[B, H, N]` each; zeros for the one that the mixer does not use."""

    importance: Scores
    redundancy: Scores
    retention: Scores


@dataclass(frozen=True)
class Policy:
    """A composition of components that decides which KV entries stay.

    Raises SpecError when the parts do not fit together; the message names the field.

    Attributes:
        name: name of the policy in tables.
        budget: entries to keep.
        trigger: when a row is compacted.
        protections: what must stay, or go, whatever its score.
        importance, redundancy, mixer: the retention score.
        allocator: how the budget is split over layers and heads.
        selector: scores and counts to slots.
        post: operations on what is kept, in order.
        phase: when compactions may happen: after prefill steps, after decode steps, or both.
        prefill_chunk: tokens per prefill step when the runtime drives the prefill, counted from the prompt's end.
        backend: which implementation of `kvpolicy.ops` to use.
        paper, departures, description: where the method comes from and how this differs from it.
    """

    name: str
    budget: Budget
    trigger: Trigger
    importance: ImportanceScorer
    redundancy: RedundancyScorer
    mixer: Mixer
    allocator: BudgetAllocator
    selector: Selector
    protections: tuple[Protection, ...] = ()
    post: tuple[PostOperation, ...] = ()
    phase: Phase = "decode"
    prefill_chunk: int | None = None
    backend: Backend = "auto"
    paper: str = ""
    departures: tuple[str, ...] = field(default=(), repr=False)
    description: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise SpecError(
                f"prefill_chunk: {self.prefill_chunk} is not a chunk size; write at least 1 or leave it out."
            )
        if self.budget.tokens is not None and self.reserved() > self.budget.tokens:
            parts = ", ".join(f"{type(p).__name__.lower()} {p.reserved()}" for p in self.protections if p.reserved())
            raise SpecError(
                f"budget: {self.budget.tokens} entries are fewer than the {self.reserved()} that are protected "
                f"({parts}); "
                "raise the budget or protect less."
            )
        self._check_phase()
        if self.counts != "equal" and any(p.changes == "positions" for p in self.post):
            dropping: list[Component] = [p for p in self.protections if p.effect == "drop"]
            uneven = self.allocator if self.selector.exact else self.selector
            raise SpecError(
                "post: re-rotated keys need the same number of entries in every head, which "
                f"{type([*dropping, uneven][0]).__name__} does not leave; remove the operation, or use "
                "`allocator: uniform`, `selector: top_k` and no protection that drops slots."
            )
        self._check_comparable()
        names = [state.name for state in self.slot_states]
        for name in names:
            if names.count(name) > 1:
                raise SpecError(
                    f"slot state {name!r}: two components of policy {self.name!r} use that name; rename one."
                )

    def _check_phase(self) -> None:
        wanted = {"prefill", "decode"} if self.phase == "both" else {self.phase}
        for component in self.components:
            if not wanted <= component.phases:
                only = " and ".join(sorted(component.phases))
                raise SpecError(
                    f"phase: {self.phase!r} does not fit {type(component).__name__}, which works at {only} only; "
                    f"write `phase: {only}` or choose another component."
                )

        ahead = [type(c).__name__ for c in self.components if c.whole_prompt]
        if ahead and self.prefill_chunk is not None:
            raise SpecError(
                f"prefill_chunk: {ahead[0]} lets the tokens of the prompt look ahead and needs it in one piece; "
                "leave prefill_chunk out."
            )

    def _check_comparable(self) -> None:
        pooled, scope, counts = self.allocator.scores_needed, self.selector.scope, self.allocator.counts
        if (scope == "model" and counts != "equal") or (scope == "layer" and counts == "per_head"):
            who = "head" if counts == "per_head" else "layer"
            raise SpecError(
                f"selector.scope: {scope!r} lets {'heads' if scope == 'layer' else 'layers'} share one set, but "
                f"{type(self.allocator).__name__} gives every {who} its own count; write `scope: head` or "
                "`allocator: uniform`."
            )
        if pooled == "none" or self.allocator.normalises:
            return
        scorers: list[tuple[str, ImportanceScorer | RedundancyScorer]] = []
        if self.mixer.uses_importance:
            scorers.append(("importance", self.importance))
        if self.mixer.uses_redundancy:
            scorers.append(("redundancy", self.redundancy))
        for kind, scorer in scorers:
            heads_ok = scorer.comparable_across_heads
            if not heads_ok or (pooled == "model" and not scorer.comparable_across_layers):
                across = "layers" if heads_ok else "heads"
                raise SpecError(
                    f"allocator: {type(self.allocator).__name__} pools scores, but those of the {kind} scorer "
                    f"{type(scorer).__name__} are not comparable across {across}; use another scorer or "
                    "`allocator: uniform`."
                )
        if not self.mixer.keeps_comparability:
            raise SpecError(
                f"allocator: {type(self.allocator).__name__} pools scores, but the mixer {type(self.mixer).__name__} "
                "makes them incomparable; use another mixer or `allocator: uniform`."
            )

    @property
    def components(self) -> tuple[Component, ...]:
        """All components whose result is used, in the order of the pipeline, each before those it is made of.

        Equal ones are listed once: they need the same, and remember the same for both.
        """
        parts: list[Component] = [self.trigger]
        if self.mixer.uses_importance:
            parts.append(self.importance)
        if self.mixer.uses_redundancy:
            parts.append(self.redundancy)
        parts += [self.mixer, self.allocator, *self.protections, self.selector, *self.post]
        found: list[Component] = []
        for part in parts:
            found += [member for member in part.members() if member not in found]
        return tuple(found)

    @property
    def counts(self) -> Literal["equal", "per_layer", "per_head"]:
        """Whether a compaction leaves every head of every layer with as many entries.

        A protection that drops slots can leave a head with fewer than its share of the budget, so that only what was
        really kept says how many.
        """
        fewer = not self.selector.exact or any(p.effect == "drop" for p in self.protections)
        return "per_head" if fewer else self.allocator.counts

    @property
    def _folds(self) -> bool:
        """Whether several layers can be scored as one."""
        scoring = [self.mixer, *self.protections]
        scoring += [self.importance] if self.mixer.uses_importance else []
        scoring += [self.redundancy] if self.mixer.uses_redundancy else []
        return all(member.same_for_layers for part in scoring for member in part.members())

    @property
    def needs(self) -> frozenset[str]:
        """Everything that the components need from a runtime."""
        return frozenset().union(*(c.needs for c in self.components))

    @property
    def observed_queries(self) -> int:
        """How many of the last queries must be at hand for a compaction."""
        return max(c.observed_queries() for c in self.components)

    @property
    def slot_states(self) -> tuple[SlotState, ...]:
        """The slot state of all components."""
        return tuple(state for c in self.components for state in c.slot_state())

    @property
    def bound(self) -> int | None:
        """Most entries per head while decoding, or None when the policy has no bound (`fraction`, prefill only)."""
        if self.budget.tokens is None or self.phase == "prefill":
            return None
        chunk = self.prefill_chunk if self.prefill_chunk is not None and self.phase == "both" else 0
        return self.budget.tokens + max(self.trigger.buffer(), chunk)

    def reserved(self, prompt_length: int = 0) -> int:
        """Entries per head that the protections keep in a long row with that prompt."""
        return sum(p.reserved(prompt_length) for p in self.protections)

    def entries(self, seen: int, prompt_length: int) -> int:
        """Entries per head to hold after a compaction of a row that has seen so many tokens."""
        return self.budget.entries(seen, self.reserved(prompt_length))

    def retention(self, view: CacheView) -> Scores:
        """Return the mixed score of one layer, fp32 `[B, H, N]`; higher = keep. Raises ScoreError on a wrong shape."""
        return self.scores(view).retention

    def scores(self, view: CacheView) -> Scored:
        """Return the retention score of one layer and what it is mixed from. Raises ScoreError on a wrong shape."""
        zeros = torch.zeros(view.shape, dtype=torch.float32, device=view.device)
        both = self.mixer.uses_importance and self.mixer.uses_redundancy
        with using_backend(self.backend, shared=both):
            importance = once(self.importance, view) if self.mixer.uses_importance else zeros
            redundancy = once(self.redundancy, view) if self.mixer.uses_redundancy else zeros
        return Scored(importance, redundancy, checked(self.mixer.mix(importance, redundancy, view), view, self.mixer))

    def masks(self, view: CacheView) -> tuple[Mask, Mask]:
        """Return (protected, allowed) of one layer, bool `[B, H, N]`; what is not valid is never allowed."""
        protected = torch.zeros(view.shape, dtype=torch.bool, device=view.device)
        allowed = view.valid
        for protection in self.protections:
            mask = protection.mask(view)
            if protection.effect == "keep":
                protected = protected | mask
            else:
                allowed = allowed & ~mask
        return protected & allowed, allowed

    def select(self, views: Sequence[CacheView], budget: Sequence[int]) -> list[KeepIndices]:
        """Decide for all layers at once which slots stay.

        Args:
            views: one view per layer, all of the same rows.
            budget: entries per head and layer to keep, one integer per row.

        Returns:
            One `KeepIndices` per view, strictly increasing, exactly as many as allocated.

        Raises:
            BudgetError: more entries are protected than the budget holds.
            ScoreError: a component returned a wrong shape or dtype, or scores that are not finite.
        """
        scores: list[Scores] = []
        protected: list[Mask] = []
        allowed: list[Mask] = []
        slots: list[Slots] = []
        # Views that a runtime makes on the way are taken one after the other, and never all at once.
        runs = folded(views) if self._folds and isinstance(views, list) else ((view, 1) for view in views)
        together: list[tuple[Slots, int]] = []
        for view, layers_in_it in runs:
            parts = (self.retention(view), *self.masks(view))
            for mine, part in zip((scores, protected, allowed), parts, strict=True):
                mine.extend(part.unflatten(0, (layers_in_it, -1)).unbind(0))
            slots += [Slots.of(view)] if layers_in_it == 1 else map(Slots.of, views[len(slots) : len(scores)])
            together.append((Slots.of(view), layers_in_it))
            num_layers = view.num_layers
        scores, protected, allowed = self._share(scores, protected, allowed)
        valid_counts = [mask.sum(-1) for mask in allowed]
        protected_counts = [mask.sum(-1) for mask in protected]
        rows = torch.tensor(list(budget), dtype=torch.int64)
        layers = [each.layer_idx for each in slots]
        self._check(layers, scores, allowed, protected_counts, rows)
        request = AllocationRequest(
            budget=rows.to(scores[0].device),
            valid=valid_counts,
            protected=protected_counts,
            scores=scores,
            masks=allowed,
            layers=layers,
            num_layers=num_layers,
            protected_masks=protected,
        )
        counts = self.allocator.allocate(request)
        if self.selector.scope == "model":
            slots = [replace(each, layer_idx=layers[0]) for each in slots]
        alike = self.counts == "equal" and all(member.same_for_layers for member in self.selector.members())
        asked = list(zip(scores, counts, protected, allowed, strict=True))
        kept: list[KeepIndices] = []
        with using_backend(self.backend):
            for whole, number in together if alike else [(each, 1) for each in slots]:
                some = asked[len(kept) : len(kept) + number]
                if number == 1:
                    kept.append(self.selector.select(*some[0], slots[len(kept)]))
                    continue
                score, count, keep, may = (torch.cat(parts) for parts in zip(*some, strict=True))
                one = self.selector.select(score, count, keep, may, whole)
                kept += map(KeepIndices, *(part.unflatten(0, (number, -1)).unbind(0) for part in one))
        return kept

    def _share(
        self, scores: list[Scores], protected: list[Mask], allowed: list[Mask]
    ) -> tuple[list[Scores], list[Mask], list[Mask]]:
        """Reduce what heads (scope `layer`) or heads and layers (scope `model`) decide together."""
        scope, how = self.selector.scope, self.selector.reduce
        if scope == "head":
            return scores, protected, allowed
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
        return (
            [s.unsqueeze(1).expand(-1, h, -1) for s, h in zip(scores, heads, strict=True)],
            [p.unsqueeze(1).expand(-1, h, -1) for p, h in zip(protected, heads, strict=True)],
            [a.unsqueeze(1).expand(-1, h, -1) for a, h in zip(allowed, heads, strict=True)],
        )

    def _check(
        self,
        layers: list[int],
        scores: list[Scores],
        allowed: list[Mask],
        protected: list[Tensor],
        rows: Tensor,
    ) -> None:
        """Refuse NaN, infinities and too small budgets, with one read from the device per compaction."""
        facts = [
            torch.stack(
                [
                    (~torch.isfinite(s.masked_fill(~a, 0.0))).any().to(torch.int64),
                    (p - rows.to(p.device)[:, None]).max(),
                    p.max(),
                ]
            ).to("cpu", non_blocking=False)
            for s, a, p in zip(scores, allowed, protected, strict=True)
        ]
        for layer, (bad, excess, most) in zip(layers, torch.stack(facts).tolist(), strict=True):
            if bad:
                raise ScoreError(
                    f"policy {self.name!r}: the retention scores of layer {layer} are not finite; "
                    "look for NaN or infinity in that layer's keys and values, or in the scorer."
                )
            if excess > 0:
                raise BudgetError(
                    f"budget: {int(rows.min())} entries per head are fewer than the {most} that policy {self.name!r} "
                    "protects; raise the budget or protect less (a pinned prompt counts inside the budget)."
                )


def _reduce(scores: Tensor, dim: int, how: str) -> Tensor:
    if how == "mean":
        return scores.mean(dim)
    return scores.sum(dim) if how == "sum" else scores.amax(dim)
