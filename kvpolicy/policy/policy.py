"""A policy: a validated composition of components, and the pure function from views to kept slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal, get_args

from kvpolicy.contracts.budget import Budget
from kvpolicy.contracts.component import named
from kvpolicy.contracts.components import (
    BudgetAllocator,
    Component,
    ImportanceScorer,
    Mixer,
    PostOperation,
    Protection,
    RedundancyScorer,
    Selector,
    SlotState,
    Trigger,
    kind_of,
)
from kvpolicy.contracts.ranks import ALONE, Ranks
from kvpolicy.contracts.view import CacheView
from kvpolicy.errors import SpecError
from kvpolicy.html_text import facts
from kvpolicy.loading.entries import shown
from kvpolicy.policy import decide as stages
from kvpolicy.policy.decision import Decision, Scored
from kvpolicy.policy.traits import Traits
from kvpolicy.types import KeepIndices, Mask, Scores

Phase = Literal["prefill", "decode", "both"]

_PARTS: Final[dict[str, type[Any]]] = {
    "budget": Budget,
    "trigger": Trigger,
    "importance": ImportanceScorer,
    "redundancy": RedundancyScorer,
    "mixer": Mixer,
    "allocator": BudgetAllocator,
    "selector": Selector,
}
_LISTS: Final[dict[str, type[Any]]] = {"protections": Protection, "post": PostOperation}


def _amount(budget: Budget) -> str:
    return f"{budget.tokens:,} entries" if budget.tokens is not None else f"{budget.fraction:g} of the tokens"


@dataclass(frozen=True)
class Policy:
    """A composition of components that decides which KV entries stay.

    Raises SpecError when the parts do not fit together; a sentence for each misfit, which names the field.

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
    backend: str = "auto"
    paper: str = ""
    departures: tuple[str, ...] = field(default=(), repr=False)
    description: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        misfits = list(self._no_parts()) or list(dict.fromkeys(self._misfits()))
        if misfits:
            raise SpecError.of(misfits)

    def _no_parts(self) -> Iterator[str]:
        """Say what is no part of a policy at all: names and plain values are for specifications."""
        instead = "give an instance of one, or write names and numbers in a PolicySpec and build() it."
        for name, kind in _PARTS.items():
            if not isinstance(part := getattr(self, name), kind):
                yield f"{name}: {shown(part)} is no {kind.__name__}; {instead}"
        for name, kind in _LISTS.items():
            parts = getattr(self, name)
            if not isinstance(parts, tuple) or not all(isinstance(part, kind) for part in parts):
                yield f"{name}: {shown(parts)} is no tuple of {kind.__name__}; {instead}"
        if self.phase not in get_args(Phase):
            yield f"phase: {shown(self.phase)} is none; write one of {', '.join(get_args(Phase))}."

    def _misfits(self) -> Iterator[str]:
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            yield f"prefill_chunk: {self.prefill_chunk} is not a chunk size; write at least 1 or leave it out."
        if self.budget.tokens is not None and self.reserved() > self.budget.tokens:
            parts = ", ".join(f"{named(p)} {p.reserved()}" for p in self.protections if p.reserved())
            yield (
                f"budget: {self.budget.tokens} entries are fewer than the {self.reserved()} that are protected "
                f"({parts}); raise the budget or protect less."
            )
        if not self.ranks and not self.protections and self.budget.fraction != 1.0:
            yield (
                f"budget: policy {self.name!r} ranks nothing and protects nothing, so that a budget would keep the "
                "oldest entries whatever they are; leave the budget at 1.0, or choose an importance such as `recency` "
                "or `random`."
            )
        yield from self._misfits_of_phase()
        if self.counts != "equal" and any(p.changes == "positions" for p in self.post):
            dropping: list[Component] = [p for p in self.protections if p.effect == "drop" and not p.only_padding]
            uneven = self.allocator if self.selector.exact else self.selector
            yield (
                "post: re-rotated keys need the same number of entries in every head, which "
                f"{named([*dropping, uneven][0])} does not leave; remove the operation, or use "
                "`allocator: uniform`, `selector: top_k` and no protection that drops slots."
            )
        yield from self._misfits_of_pools()
        for name, count in Counter(state.name for state in self.slot_states).items():
            if count > 1:
                yield f"slot state {name!r}: two components of policy {self.name!r} use that name; rename one."

    def _misfits_of_phase(self) -> Iterator[str]:
        wanted = {"prefill", "decode"} if self.phase == "both" else {self.phase}
        for component in self.components:
            if not wanted <= component.phases:
                only = " and ".join(sorted(component.phases))
                yield (
                    f"phase: {self.phase!r} does not fit {named(component)}, which works at {only} only; "
                    f"write `phase: {only}` or choose another component."
                )
        ahead = [named(c) for c in self.components if c.whole_prompt]
        if ahead and self.prefill_chunk is not None:
            yield (
                f"prefill_chunk: {ahead[0]} lets the tokens of the prompt look ahead and needs it in one piece; "
                "leave prefill_chunk out."
            )

    def _misfits_of_pools(self) -> Iterator[str]:
        """Say why scores or sets of several heads or layers cannot be taken together."""
        pooled, scope, counts = self.allocator.scores_needed, self.selector.scope, self.allocator.counts
        if (scope == "model" and counts != "equal") or (scope == "layer" and counts == "per_head"):
            who = "head" if counts == "per_head" else "layer"
            yield (
                f"selector.scope: {scope!r} lets {'heads' if scope == 'layer' else 'layers'} share one set, but "
                f"{named(self.allocator)} gives every {who} its own count; write `scope: head` or "
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
                yield (
                    f"allocator: {named(self.allocator)} pools scores, but those of the {kind} scorer "
                    f"{named(scorer)} are not comparable across {across}; use another scorer or "
                    "`allocator: uniform`."
                )
        if not self.mixer.keeps_comparability:
            yield (
                f"allocator: {named(self.allocator)} pools scores, but the mixer {named(self.mixer)} "
                "makes them incomparable; use another mixer or `allocator: uniform`."
            )

    def __repr__(self) -> str:
        bound = "no bound while decoding" if self.bound is None else f"at most {self.bound:,} entries while decoding"
        return f"Policy({self.name!r}, {_amount(self.budget)}, {self.phase}, {bound})"

    def _repr_html_(self) -> str:
        parts = [(kind_of(type(part)), part) for part in self.components]
        return facts(f"Policy: {self.name}", [("budget", _amount(self.budget)), ("phase", self.phase), *parts])

    @cached_property
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

    @cached_property
    def ranks(self) -> bool:
        """Whether scores tell entries apart; where they do not, protections and age decide."""
        used: list[ImportanceScorer | RedundancyScorer] = [self.importance] if self.mixer.uses_importance else []
        used += [self.redundancy] if self.mixer.uses_redundancy else []
        held = [m for m in self.mixer.members() if isinstance(m, ImportanceScorer | RedundancyScorer)]
        # A mixer that uses neither makes scores of its own.
        return not used or not all(scorer.constant for scorer in (*used, *held))

    @cached_property
    def remembering(self) -> tuple[Component, ...]:
        """The components that remember something at a compaction, in slot state."""
        return tuple(c for c in self.components if type(c).remember is not Component.remember)

    @cached_property
    def counts(self) -> Literal["equal", "per_layer", "per_head"]:
        """Whether a compaction leaves every head of every layer with as many entries.

        A protection that drops slots can leave a head with fewer than its share of the budget, so that only what was
        really kept says how many.
        """
        fewer = not self.selector.exact or any(p.effect == "drop" and not p.only_padding for p in self.protections)
        return "per_head" if fewer else self.allocator.counts

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

    @cached_property
    def traits(self) -> Traits:
        """What a runtime must know before it starts."""
        equal = self.counts == "equal"
        return Traits(
            equal_counts=equal,
            # `counts` is "equal" only with an exact selector and without protections that drop entries, and budgets of
            # both kinds are numbers that follow from tokens seen and the prompt.
            length_is_counted=equal,
            needs=self.needs,
            state=self.slot_states,
            re_rotates=any(p.changes == "positions" for p in self.post),
            whole_prompt=any(c.whole_prompt for c in self.components),
        )

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
        return stages.scores(self, view)

    def masks(self, view: CacheView) -> tuple[Mask, Mask]:
        """Return (protected, allowed) of one layer, bool `[B, H, N]`; what is not valid is never allowed."""
        return stages.masks(self, view)

    def select(self, views: Sequence[CacheView], budget: Sequence[int]) -> list[KeepIndices]:
        """Return what `decide` keeps of each layer; arguments and exceptions are the same."""
        return self.decide(views, budget).kept

    def decide(self, views: Sequence[CacheView], budget: Sequence[int], ranks: Ranks = ALONE) -> Decision:
        """Decide for all layers at once which slots stay, in the stages of `kvpolicy.policy.decide`.

        Args:
            views: one view per layer, all of the same rows.
            budget: entries per head and layer to keep, one integer per row.
            ranks: brings the scores of heads that lie on other ranks, where heads decide together.

        Returns:
            For every layer what was scored, ranked and allocated, and one `KeepIndices`, strictly increasing, exactly
            as many as allocated.

        Raises:
            BudgetError: more entries are protected than the budget holds.
            ScoreError: scores have a wrong shape, dtype or device, or are not finite.
            ComponentError: a component returned something else that its contract does not allow, or wrote to its input.
        """
        return stages.decide(self, views, budget, ranks)
