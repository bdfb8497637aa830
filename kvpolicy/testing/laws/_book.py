"""A cache beside its books: an engine, and what it must hold, kept in plain Python lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import InstanceOf
from torch import Tensor

from kvpolicy.cache.engine import Engine
from kvpolicy.cache.entering import NEED, enter
from kvpolicy.cache.ledger import Kind
from kvpolicy.cache.picture import LayerFacts
from kvpolicy.contracts.components import Counters, SlotState, Trigger
from kvpolicy.contracts.view import CacheView, Rope
from kvpolicy.errors import CacheStateError
from kvpolicy.policy.policy import Policy
from kvpolicy.testing.laws._base import broken
from kvpolicy.testing.scaling import protected
from kvpolicy.types import Weights

_LAYERS, _HEADS, _GROUP = 2, 2, 2
_PROJECTION = torch.randn(_HEADS, _GROUP, 4, 6, generator=torch.Generator().manual_seed(7))
_FACTS = LayerFacts(groups=_GROUP, scale=0.5, output_projection=_PROJECTION)

Step = tuple[Any, ...]
"""The name of a method of `Book`, without its underscore, and the arguments."""

_FED = {"attention", "query_stream", "query_statistics"}  # needs whose queries are fed once and cannot be taken back
_ROLLBACK = 16  # single tokens that may be taken back at any time and still leave a policy the queries it looks at


class _Needs:
    """The needs of the wrapped trigger, and attention."""

    def __get__(self, trigger: Tagged | None, _owner: type[Tagged]) -> frozenset[str]:
        return frozenset({"attention"}) | (trigger.inner.needs if trigger is not None else frozenset())


class Tagged(Trigger):
    """A trigger that also keeps slot state: whose entry this is, and how many queries have seen it."""

    needs = _Needs()

    inner: InstanceOf[Trigger]
    """Decides when."""

    def slot_state(self) -> tuple[SlotState, ...]:
        """Declare the tags, besides what the trigger keeps."""
        return (*self.inner.slot_state(), SlotState("law_owner", fill=-1.0), SlotState("law_visits"))

    def observe_attention(self, view: CacheView, weights: Weights) -> Mapping[str, Tensor]:
        """Note the owner once, by its value, and count the queries."""
        owner, visits = view.state["law_owner"], view.state["law_visits"]
        seen = (weights > 0).any(2).sum(2)
        noted = torch.where((owner < 0) & (seen > 0), view.values[..., 0].float(), owner)
        return {"law_owner": noted, "law_visits": visits + seen}

    def fires(self, counters: Counters) -> bool:
        """Ask the wrapped trigger."""
        return self.inner.fires(counters)

    def buffer(self) -> int:
        """Ask the wrapped trigger."""
        return self.inner.buffer()


@dataclass
class _ExpectedRow:
    """What one row must hold.

    Attributes:
        uids: the token at each position.
        columns: for each column since the beginning, whether it was a token of this row.
        held: by layer and head, positions in order.
        compactions: how many the engine counted at the last look.
        floor: tokens at the last compaction; a crop may go back so far.
    """

    uids: list[int] = field(default_factory=list)
    columns: list[bool] = field(default_factory=list)
    held: list[list[int]] = field(default_factory=lambda: [[] for _ in range(_LAYERS * _HEADS)])
    compactions: int = 0
    floor: int = 0


def _content(uid: int, layer: int, head: int) -> list[float]:
    return [uid / 1024, layer / 8, head / 8, 0.25]


def _images(row: _ExpectedRow) -> list[bool]:
    """Return which columns are image tokens."""
    uids = iter(row.uids)
    return [real and next(uids) % 3 == 1 for real in row.columns]


def longest_prompt(policy: Policy) -> int:
    """Return how long prompts are at most: short ones leave room for steps, but some policies evict nothing else."""
    return 32 if policy.phase == "prefill" else 4


class Book:
    """Applies steps to an engine and to lists, and compares them after each.

    Attributes:
        evictions: compactions of rows so far.
    """

    def __init__(self, policy: Policy) -> None:
        self.evictions = 0
        self.uid = 0
        self.given = policy
        self._make(tagged=True, room=0)

    def _make(self, *, tagged: bool, room: int) -> None:
        """Begin with an empty engine.

        Args:
            tagged: entries carry tags as slot state, which takes observing attention; crops go back less far then.
            room: entries more in the budget, so that more tokens come between compactions.
        """
        policy, tokens = self.given, self.given.budget.tokens
        if tokens is not None:
            tokens = max(tokens, protected(policy, longest_prompt(policy)) + 2) + room
            policy = replace(policy, budget=policy.budget.model_copy(update={"tokens": tokens}))
        self.tagged = tagged
        self.policy = replace(policy, trigger=Tagged(inner=policy.trigger)) if tagged else policy
        rope = Rope(torch.tensor([1.0, 0.25]))
        ropes = dict.fromkeys(range(_LAYERS), rope) if "rope" in policy.needs else {}
        self.engine = Engine(self.policy, [tuple(range(_LAYERS))], _LAYERS, ropes)
        self.changes = {post.changes for post in policy.post}
        self.rows: list[_ExpectedRow] = []
        self.cropped = 0  # columns taken back since the queries that the policy looks at were last complete
        self.taken_back = False  # the last thing that happened was a crop
        self.fresh = 0  # tokens that every row has had since the last crop

    def apply(self, step: Step) -> None:
        """Apply one step to both and compare; raises LawBrokenError."""
        name, *arguments = step
        if name == "make":
            self._make(tagged=arguments[0], room=arguments[1])
        if name == "make" or (name != "append" and not self.rows):
            return
        before = [len(row.uids) for row in self.rows]
        getattr(self, f"_{name}")(*arguments)
        self.compare(f"after {step}", before if name in ("append", "settle") else None)

    def _append(self, counts: tuple[int, ...]) -> None:
        prompt = not self.rows
        if prompt:
            self.rows = [_ExpectedRow() for _ in counts]
            counts = tuple(max(1, n) for n in counts)
        elif not self.engine.decoding and not self.engine.rows[0].decoded:
            counts = tuple(min(n, 1) for n in counts)  # the first decode step ends the prompt
        counts = (*counts, *[1] * len(self.rows))[: len(self.rows)]
        if not any(counts):
            counts = (1,) * len(self.rows)
        columns = max(counts)
        valid = torch.tensor([[False] * (columns - n) + [True] * n for n in counts])
        whole = None if bool(valid.all()) else valid
        # Several tokens at once are another turn; after a crop they are a check of candidates.
        taken_back, self.taken_back = self.taken_back, False
        kind: Kind = "prompt" if prompt or (columns > 1 and not taken_back) else "verify" if columns > 1 else "decode"
        if self._refused(lambda: self.engine.open(len(self.rows), columns, whole, torch.device("cpu"), kind=kind)):
            return
        self.fresh += min(counts)
        for row, count in zip(self.rows, counts, strict=True):
            row.columns += [False] * (columns - count) + [True] * count
            for _ in range(count):
                for held in row.held:
                    held.append(len(row.uids))
                row.uids.append(self.uid)
                self.uid += 1
        if "modality" in self.policy.needs:
            self.engine.modality = torch.tensor([_images(row) for row in self.rows])
        for layer in range(_LAYERS):
            keys = self._new(counts, columns, layer, _HEADS)
            self.engine.append(layer, keys, keys.clone())
            if NEED in self.policy.needs:
                enter(self.engine, layer, keys.transpose(1, 2).flatten(2))
            self.engine.record(layer, self._new(counts, columns, layer, _HEADS * _GROUP), _FACTS)

    def _decode(self, times: int) -> None:
        for _ in range(times):
            self.apply(("append", (1,) * len(self.rows)))

    def _new(self, counts: tuple[int, ...], columns: int, layer: int, heads: int) -> Tensor:
        new = torch.full((len(self.rows), heads, columns, 4), float("nan"))
        for b, (row, count) in enumerate(zip(self.rows, counts, strict=True)):
            for i, uid in enumerate(row.uids[len(row.uids) - count :]):
                for h in range(heads):
                    new[b, h, columns - count + i] = torch.tensor(_content(uid, layer, h))
        return new

    def _rows(self, index: tuple[int, ...]) -> None:
        order = [i % len(self.rows) for i in index]
        self.engine.take_rows(torch.tensor(order))
        self.rows = [deepcopy(self.rows[i]) for i in order]

    def _crop(self, columns: int) -> None:
        columns = min(columns, len(self.rows[0].columns) - 1)
        losses = [sum(row.columns[len(row.columns) - columns :]) for row in self.rows]
        behind = any(len(row.uids) - lost < row.floor for row, lost in zip(self.rows, losses, strict=True))
        fed = bool(_FED & self.policy.needs)
        observed = fed and columns > self.engine.log.unobserved
        try:
            self.engine.crop(columns)
        except CacheStateError as error:
            if not behind and not observed:
                raise broken(f"a crop by {columns} is refused, and nothing has been compacted since: {error}") from None
            return
        if behind or observed:
            raise broken(f"a crop by {columns} goes back behind {'a compaction' if behind else 'what was observed'}.")
        self.taken_back = True
        self.cropped, self.fresh = self.cropped + columns, 0
        for row, lost in zip(self.rows, losses, strict=True):
            row.columns = row.columns[: len(row.columns) - columns]
            row.uids = row.uids[: len(row.uids) - lost]
            row.held = [[p for p in held if p < len(row.uids)] for held in row.held]

    def _settle(self) -> None:
        self._refused(self.engine.settle)

    def _refused(self, compact: Callable[[], Any]) -> bool:
        """Run what may compact; whether that is refused because a deep crop has taken queries that are looked at."""
        if self.fresh >= self.policy.observed_queries + _ROLLBACK:
            self.cropped = 0
        try:
            compact()
        except CacheStateError as error:
            if self.cropped <= _ROLLBACK:
                raise broken(f"a compaction is refused after {self.cropped} columns were taken back: {error}") from None
            return True
        return False

    def _observe(self) -> None:
        self.engine.observe()

    def _fork(self) -> None:
        twin = copy(self)
        twin.engine, twin.rows = self.engine.clone(), deepcopy(self.rows)
        twin.apply(("decode", self.policy.trigger.buffer() + 2))  # so that the copy is compacted

    def _reset(self) -> None:
        self.engine.reset()
        self.rows, self.cropped, self.fresh = [], 0, 0

    def compare(self, when: str, before: list[int] | None = None) -> None:
        """Compare the engine with the lists; what was evicted is taken over from it, everything else must agree.

        Args:
            when: beginning of messages.
            before: tokens of each row when a compaction may have run; None if none may have.
        """
        observed = self.engine.log.unobserved == 0
        for b, row in enumerate(self.rows):
            counters = self.engine.rows[b]
            if counters.seen != len(row.uids):
                raise broken(f"{when}, row {b}: the engine has seen {counters.seen} tokens instead of {len(row.uids)}.")
            part = slice(b, b + 1)
            for layer in range(_LAYERS):
                view = self.engine.view(layer, part, self.engine.log.window())
                for h in range(_HEADS):
                    where = f"{when}, row {b}, layer {layer}, head {h}"
                    place = layer * _HEADS + h
                    may_evict = before is not None and counters.compactions > row.compactions
                    self._compare_head(where, view, row, (layer, h), may_evict=may_evict, observed=observed)
                    if self.policy.counts == "equal" and len(row.held[place]) != counters.resident:
                        raise broken(f"{where}: {len(row.held[place])} entries, {counters.resident} are counted.")
                self._compare_queries(f"{when}, row {b}, layer {layer}", view, row, layer)
            mean = -(-sum(map(len, row.held)) // len(row.held))
            if mean != counters.resident:
                raise broken(f"{when}, row {b}: {mean} entries on average, {counters.resident} are counted.")
            if before is not None and counters.compactions > row.compactions:
                self.evictions += 1
                row.floor = before[b]
            row.compactions = counters.compactions

    def _compare_head(
        self, where: str, view: CacheView, row: _ExpectedRow, at: tuple[int, int], *, may_evict: bool, observed: bool
    ) -> None:
        layer, h = at
        place = layer * _HEADS + h
        slots = view.valid[0, h].nonzero()[:, 0]
        now = view.positions[0, h, slots].tolist()
        expected = row.held[place]
        if now != (sorted(set(now) & set(expected)) if may_evict else expected):
            raise broken(f"{where}: holds positions {now}, and {expected} was there before.")
        row.held[place] = now
        content = torch.tensor([_content(row.uids[p], layer, h) for p in now]).reshape(-1, 4)
        stored = [("values", view.values, "values" not in self.changes)]
        stored.append(("keys", view.keys, not self.changes))
        for name, tensor, comparable in stored:
            if comparable and not torch.equal(tensor[0, h, slots], content):
                raise broken(f"{where}: the {name} are not those of positions {now}.")
        if not self.tagged:
            return
        owners = view.state["law_owner"][0, h, slots]
        if "values" not in self.changes and bool(((owners != content[:, 0]) & (owners >= 0)).any()):
            raise broken(f"{where}: slot state is not that of positions {now}.")
        if not observed:
            return
        visits = view.state["law_visits"][0, h, slots].tolist()
        if visits != [len(row.uids) - p for p in now]:
            raise broken(f"{where}: slot state {visits} instead of {[len(row.uids) - p for p in now]} queries seen.")
        if bool((owners < 0).any()):
            raise broken(f"{where}: slot state {owners.tolist()} has been reset.")

    def _compare_queries(self, where: str, view: CacheView, row: _ExpectedRow, layer: int) -> None:
        if view.queries is None or view.query_positions is None or view.query_valid is None or self.changes:
            return
        asked = view.query_positions[0][view.query_valid[0]].tolist()
        wanted = min(self.policy.observed_queries, len(row.uids))
        last = list(range(len(row.uids) - wanted, len(row.uids)))
        if sorted(asked) != last:
            raise broken(f"{where}: shows the queries of positions {asked} instead of {last}.")
        for h in range(_HEADS):
            for g in range(_GROUP):
                got = view.queries[0, h, g][view.query_valid[0]]
                content = torch.tensor([_content(row.uids[p], layer, h * _GROUP + g) for p in asked]).reshape(-1, 4)
                if not torch.equal(got, content):
                    raise broken(f"{where}: the queries of head {h}, group {g} are not those of positions {asked}.")
