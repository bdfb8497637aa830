"""What every row of a cache holds, in plain integers, and when a row is compacted: the one place that asks triggers.

No torch here: an engine's scheduler and each of its workers run the same ledger over the same step sizes and agree on
every count and position without telling each other anything.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, Literal, Protocol, TypeVar

from kvpolicy.contracts.budget import Budget
from kvpolicy.contracts.trigger import Counters, Trigger
from kvpolicy.errors import CacheStateError

Kind = Literal["prompt", "decode", "verify"]
"""What a row's incoming tokens are: more of a prompt, a decode step, or candidates that decoding may take back."""

AnyRow = TypeVar("AnyRow", bound=Hashable)
"""What names the rows of one ledger: their numbers in a batch, or requests' ids."""


@dataclass(frozen=True)
class Incoming:
    """Tokens about to be appended to one row.

    Attributes:
        tokens: how many, padding not counted; 0 for a row that sits a step out.
        kind: what they are; where some lie behind the prompt, what the first of them is.
        decoded: how many of a prompt's tokens lie behind it: an engine that gave a row up reads anew what it has
            decoded, and need not stop where the prompt ends.
    """

    tokens: int
    kind: Kind = "decode"
    decoded: int = 0


class Schedule(Protocol):
    """What the ledger reads of a policy; `kvpolicy.policy.policy.Policy` is one."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def budget(self) -> Budget: ...  # noqa: D102
    @property
    def trigger(self) -> Trigger: ...  # noqa: D102
    @property
    def phase(self) -> Literal["prefill", "decode", "both"]: ...  # noqa: D102
    def entries(self, seen: int, prompt_length: int) -> int:
        """Return the entries per head to hold after a compaction of a row that has seen so many tokens."""


@dataclass
class RowCounts:
    """Counters of one row; all per KV head and layer (means over them, rounded up, where heads hold different numbers).

    Attributes:
        resident: entries held now: what attention reads.
        seen: tokens that count, which is also the position of the next one. Padding and hidden tokens do not count.
        prompt: those of them that came before the first decode step.
        compactions: how often the row has been compacted.
        floor: `seen` at the last compaction; tokens before it cannot be taken back.
        peak: most entries ever held.
        last: kind of the last tokens; None before the first.
        decoded: a token has been decoded, so that the prompt is complete.
        shift: how far the rotation of new keys lies behind their position, where kept keys are re-rotated.
    """

    resident: int = 0
    seen: int = 0
    prompt: int = 0
    compactions: int = 0
    floor: int = 0
    peak: int = 0
    last: Kind | None = None
    decoded: bool = False
    shift: int = 0

    @property
    def decoding(self) -> bool:
        """Whether the last tokens were decoded, rather than given."""
        return self.last is not None and self.last != "prompt"


class Ledger(Generic[AnyRow]):
    """Counts the entries and tokens of rows under one policy, and says which rows are due for a compaction.

    A step is `due` (which rows must be compacted before these tokens?), `compacted` for each of those, then `advance`.
    A row comes into being with `enter` or with its first tokens.

    Args:
        schedule: budget, trigger and phase: a policy.
        re_rotates: whether kept keys are given the positions `0 ... n-1`.
        prompt_room: a prompt that comes in pieces, as an engine likes, is one prompt: it is compacted when it is
            complete, and before that only where more than so many entries would be held. None where the pieces are
            meant: each is followed by what the policy says of a prompt.
        spared: says of a prompt's length that its row is never compacted: an engine cannot refuse one request.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        re_rotates: bool = False,
        prompt_room: int | None = None,
        spared: Callable[[int], bool] | None = None,
    ) -> None:
        self.schedule = schedule
        self.re_rotates, self.prompt_room, self.spared = re_rotates, prompt_room, spared
        self.rows: dict[AnyRow, RowCounts] = {}
        self._owed: set[AnyRow] = set()  # rows that `due` named and that have not been compacted yet
        self._fixed = schedule.budget.tokens  # asked at every step: the common case does without arithmetic

    # -- one step -----------------------------------------------------------------------------------------------------

    def due(self, step: Mapping[AnyRow, Incoming]) -> list[AnyRow]:
        """Return the rows that must be compacted before these tokens are appended, in the order of the step."""
        found = [
            row
            for row, incoming in step.items()
            if incoming.tokens and row in self.rows and self._due(self.rows[row], incoming)
        ]
        self._owed = set(found)
        return found

    def _due(self, counts: RowCounts, incoming: Incoming) -> bool:
        if self.spared is not None and self.spared(counts.prompt):
            return False
        if self.prompt_room is None or incoming.kind != "prompt" or counts.last != "prompt":
            return self._fires(counts, incoming.tokens)
        entries = self.schedule.entries(counts.seen, counts.prompt)
        return counts.resident > entries and counts.resident + incoming.tokens > self.prompt_room

    def _fires(self, counts: RowCounts, incoming: int) -> bool:
        if counts.last is None:
            return False
        # The phase is that of the tokens behind us: a prompt is compacted after it, whatever comes next.
        if self.schedule.phase not in ("both", "decode" if counts.decoding else "prefill"):
            return False
        entries = self._fixed or self.schedule.entries(counts.seen, counts.prompt)
        return counts.resident > entries and self.schedule.trigger.fires(
            Counters(counts.resident, entries, incoming, counts.seen, counts.prompt)
        )

    def above(self) -> list[AnyRow]:
        """Return the rows that hold more than their budget, whatever trigger and phase say; they are due now."""
        found = [row for row, counts in self.rows.items() if counts.resident > self.entries(row)]
        self._owed = set(found)
        return found

    def entries(self, row: AnyRow) -> int:
        """Return the entries per head that a compaction of the row now aims at: what its budget says."""
        counts = self.rows[row]
        return self.schedule.entries(counts.seen, counts.prompt)

    def compacted(self, row: AnyRow, kept: int | None = None) -> int:
        """Note that a row has been compacted, and return the entries that it holds now.

        Args:
            row: which row.
            kept: entries per head that were really kept (their mean over heads and layers, rounded up); None only
                where the policy's length is counted, so that the budget says it.
        """
        counts = self.rows[row]
        counts.resident = min(counts.resident, self.entries(row)) if kept is None else kept
        counts.compactions += 1
        counts.floor = counts.seen
        if self.re_rotates:
            counts.shift = counts.seen - counts.resident
        self._owed.discard(row)
        return counts.resident

    def repacked(self, row: AnyRow) -> None:
        """Note that a row's entries have been moved together without losing one: it cannot be cropped behind that."""
        self.rows[row].floor = self.rows[row].seen

    def enter(self, rows: Iterable[AnyRow]) -> None:
        """Begin to count new rows, which hold nothing yet."""
        for row in rows:
            self.rows.setdefault(row, RowCounts())

    def advance(self, step: Mapping[AnyRow, Incoming]) -> None:
        """Count tokens that are appended; a row that is new comes into being.

        Raises:
            CacheStateError: a row that was due has not been compacted.
        """
        if self._owed:
            raise CacheStateError(
                f"row {next(iter(self._owed))!r} is due for a compaction under policy {self.schedule.name!r}; compact "
                "it before more tokens are appended."
            )
        for row, incoming in step.items():
            if row not in self.rows:
                self.enter([row])
            if not incoming.tokens:
                continue  # a row that sits a step out is as it was
            counts = self.rows[row]
            counts.resident += incoming.tokens
            counts.seen += incoming.tokens
            counts.peak = max(counts.peak, counts.resident)
            behind = incoming.decoded if incoming.kind == "prompt" else incoming.tokens
            if not counts.decoded:  # a prompt may come in pieces, and ends with the first decode step
                counts.prompt = counts.seen - behind
            counts.decoded = counts.decoded or behind > 0
            counts.last = "decode" if incoming.decoded else incoming.kind

    # -- what was counted ---------------------------------------------------------------------------------------------

    def resident(self, row: AnyRow) -> int:
        """Return the entries that a row holds per head: what attention reads."""
        return self.rows[row].resident

    def position(self, row: AnyRow) -> int:
        """Return the position of the row's next token, which no compaction changes."""
        return self.rows[row].seen

    def room(self, row: AnyRow, most: int) -> int:
        """Return how many tokens may be decoded at once, at most `most`, without moving a compaction.

        With so many in one step a row is compacted between the same two tokens as when they come one by one.
        """
        counts = self.rows[row]

        def fires(ahead: int, incoming: int, last: Kind | None) -> bool:
            seen = counts.seen + ahead
            later = replace(counts, resident=counts.resident + ahead, seen=seen, last=last)
            return self._fires(later, incoming)

        several = 1
        while several < most and not fires(several, 1, "decode"):
            several += 1
        # A trigger may look at how many tokens come; a compaction that one token would not cause must not happen.
        while several > 1 and fires(0, several, counts.last):
            several -= 1
        return several

    # -- what is taken back -------------------------------------------------------------------------------------------

    def retract(self, row: AnyRow, tokens: int) -> None:
        """Take back the newest tokens of a row: a crop, or candidates that were not right.

        Raises:
            CacheStateError: some of them were there at the last compaction.
        """
        counts = self.rows[row]
        if counts.seen - tokens < counts.floor:
            raise CacheStateError(
                f"{tokens} tokens back lies before the last compaction, which was at token {counts.floor} of "
                f"{counts.seen}; take back at most {counts.seen - counts.floor} tokens, or fork() the cache before "
                "going on."
            )
        counts.resident -= tokens
        counts.seen -= tokens
        counts.prompt = min(counts.prompt, counts.seen)
        if counts.seen == counts.prompt and counts.decoded:
            counts.decoded, counts.last = False, "prompt"

    def hide(self, row: AnyRow, tokens: int, prompt: int) -> None:
        """Forget tokens, anywhere in a row that has not been compacted, that do not count any more.

        Later tokens move down in position, as in a mask that shows the others only.

        Args:
            row: which row.
            tokens: how many are hidden.
            prompt: how many of them belonged to the prompt.
        """
        counts = self.rows[row]
        counts.resident -= tokens
        counts.seen -= tokens
        counts.prompt -= prompt
        counts.floor = counts.seen

    def drop(self, row: AnyRow) -> None:
        """Forget a row: it has finished, or everything that it holds has been given up."""
        self.rows.pop(row, None)
        self._owed.discard(row)

    def take(self, rows: Mapping[AnyRow, AnyRow]) -> None:
        """Go on with copies of rows under new names, new -> old: a batch that is reordered, repeated or thinned out."""
        self.rows = {new: replace(self.rows[old]) for new, old in rows.items()}
        self._owed.clear()

    def clone(self) -> Ledger[AnyRow]:
        """Return an independent copy."""
        twin: Ledger[AnyRow] = Ledger(
            self.schedule, re_rotates=self.re_rotates, prompt_room=self.prompt_room, spared=self.spared
        )
        twin.rows = {row: replace(counts) for row, counts in self.rows.items()}
        return twin
