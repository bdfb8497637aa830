"""A compaction: read views, decide, replace, move, count. The same for every store and every runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol

from torch import Tensor

from kvpolicy import ops
from kvpolicy.cache.ledger import AnyRow, Ledger
from kvpolicy.contracts.ranks import ALONE, Ranks
from kvpolicy.contracts.view import CacheView
from kvpolicy.policy import checks
from kvpolicy.policy.checks import Untouched
from kvpolicy.policy.policy import Policy
from kvpolicy.types import KeepIndices


@dataclass(frozen=True)
class Decided(Generic[AnyRow]):
    """What has been decided for some rows that are seen in one view.

    Attributes:
        rows: their names, in the order of the views' first axis.
        kept: what each layer keeps, in the order of the cache's layers.
        counts: how many slots those are, int64 `[B, H]` on the CPU for each layer; they came with the decision's read.
        changes: by index into `kept`, what a layer replaces before anything moves (slot state that components remember,
            results of post-operations), by the names of `SlotTensors.arenas`. Made when it is asked for and not kept: a
            post-operation may return the values of a whole layer, and only one layer's should live at a time.
    """

    rows: Sequence[AnyRow]
    kept: Sequence[KeepIndices]
    counts: Sequence[Tensor]
    changes: Callable[[int], Mapping[str, Tensor]]


class Compactable(Protocol[AnyRow]):
    """A cache, as its compactor sees it: it shows rows, and keeps of them what it is told."""

    def together(self, rows: Sequence[AnyRow]) -> Sequence[Sequence[Sequence[AnyRow]]]:
        """Return the rows in groups that must move together, each in parts that can be seen in one view."""
        ...

    def views(self, rows: Sequence[AnyRow], budget: Sequence[int]) -> Sequence[CacheView]:
        """Return what components may see of some rows, one view per layer; `budget` has one integer per row."""
        ...

    def keep(self, decided: Sequence[Decided[AnyRow]]) -> Mapping[AnyRow, int]:
        """Replace and move what was decided for one group of `together`; return what each of its rows holds now.

        Counted, per head on average and rounded up: a row's length is what was kept, never what a budget promised.
        """
        ...


class Compactor(Generic[AnyRow]):
    """Runs compactions of one cache under one policy.

    Args:
        policy: what decides.
        ledger: what counts.
        cache: what is compacted.
        ranks: the other ranks of tensor parallelism, which compact the same rows at the same time.
    """

    def __init__(
        self, policy: Policy, ledger: Ledger[AnyRow], cache: Compactable[AnyRow], ranks: Ranks = ALONE
    ) -> None:
        self.policy = policy
        self.ledger = ledger
        self.cache = cache
        self.ranks = ranks

    def run(self, rows: Sequence[AnyRow]) -> None:
        """Compact these rows.

        Raises:
            BudgetError, ComponentError: from the policy; then nothing of the group has moved.
        """
        # One scope for all of it: what scores, what selects, what remembers and what moves use the same backend.
        with ops.using_backend(self.policy.backend):
            for group in self.cache.together(rows):
                decided = [self._decide(part) for part in group]
                for row, kept in self.cache.keep(decided).items():
                    self.ledger.compacted(row, kept)

    def _decide(self, rows: Sequence[AnyRow]) -> Decided[AnyRow]:
        """Two phases: all layers are scored before any is decided, for scopes and pools may cross layers."""
        budget = [self.ledger.entries(row) for row in rows]
        views = self.cache.views(rows, budget)
        decision = self.policy.decide(views, budget, self.ranks)
        kept = decision.kept
        changing = bool(self.policy.remembering or self.policy.post)  # else no view is made for it: it may be a copy
        return Decided(
            rows, kept, decision.lengths, lambda index: self._changes(views[index], kept[index]) if changing else {}
        )

    def _changes(self, view: CacheView, kept: KeepIndices) -> dict[str, Tensor]:
        watch = Untouched.of(view)
        changes: dict[str, Tensor] = {}
        for component in self.policy.remembering:
            new = checks.state(component.remember(view), view, component)
            watch.by(component)
            changes |= {f"state.{name}": tensor for name, tensor in new.items()}
        for post in self.policy.post:
            made: Any = checks.replacements(post.apply(view, kept), view, post)
            watch.by(post)
            view = replace(view, **made)  # the next operation sees what this one did
            changes |= made
        return changes
