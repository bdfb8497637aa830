"""A scripted scheduler of a paged engine: requests that come, are read in pieces, decode, are preempted and finish.

It runs a ledger and owns the blocks, and knows nothing of tensors: this module imports no torch. What it decides for a
step is an `Order`, which a worker carries out; `expected` says what the worker must then find.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from kvpolicy.cache.blocks import live_blocks
from kvpolicy.cache.ledger import Incoming, Kind, Ledger, Schedule


class Pool:
    """Blocks and who owns them; every hand-over is checked."""

    def __init__(self, blocks: int) -> None:
        self.free = deque(range(blocks))
        self.owner: dict[int, str] = {}

    def take(self, row: str, count: int) -> list[int]:
        """Hand out blocks to a row."""
        taken = [self.free.popleft() for _ in range(count)]
        for block in taken:
            assert block not in self.owner
            self.owner[block] = row
        return taken

    def give_back(self, row: str, blocks: list[int]) -> None:
        """Take blocks back from the row that owns them; they are handed out again last."""
        for block in blocks:
            assert self.owner.pop(block) == row
            self.free.append(block)


@dataclass
class Request:
    """One request: `given` tokens are read as a prompt, then it decodes until it has `total`.

    After a preemption its first `known` tokens are read anew. Those behind the prompt come in pieces too, but they
    count as decoded: what the prompt is does not change, and the request is compacted between the pieces.
    """

    name: str
    given: int
    total: int
    known: int = 0
    table: list[int | None] = field(default_factory=list)


@dataclass(frozen=True)
class Order:
    """What happens in one step.

    Attributes:
        retracted: tokens that are taken back, by row, before anything else.
        released: rows that have finished or been preempted, in this order.
        bound: new blocks by row; a row that comes for the first time is bound to them.
        step: the tokens, by row, in the order in which they are packed.
        due: rows that are compacted before them.
        freed: blocks that are free after those compactions, by row.
        resident: entries that each row of the step holds afterwards.
    """

    retracted: dict[str, int]
    released: list[str]
    bound: dict[str, list[int]]
    step: dict[str, Incoming]
    due: list[str]
    freed: dict[str, list[int]]
    resident: dict[str, int]


class Scheduler:
    """Schedules random requests over a pool of blocks, a policy's ledger at hand.

    Args:
        schedule: what a ledger reads of a policy.
        seed: of the script.
        blocks, block: the pool.
        longest: tokens of the longest request.
        tokens: most tokens of a step.
        piece: most tokens of a prompt in one step.
        candidates: tokens of a speculative step; 0 for none.
        prompt: tokens of the longest prompt; the longest request's by default.
    """

    def __init__(
        self, schedule: Schedule, seed: int, *, blocks: int, block: int, longest: int = 120, tokens: int = 40,
        piece: int = 16, candidates: int = 0, prompt: int | None = None,
    ) -> None:  # fmt: skip
        self.random = Random(seed)
        self.pool, self.block = Pool(blocks), block
        self.ledger: Ledger[str] = Ledger(schedule)
        self.longest, self.prompt = longest, longest if prompt is None else prompt
        self.tokens, self.piece, self.candidates = tokens, piece, candidates
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = self.compactions = self.retractions = self.made = self.finished = 0
        self.peak = self.peak_decoding = 0  # most entries that a row has held

    def orders(self, steps: int) -> Iterator[Order]:
        """Yield so many steps, and then those that bring what is left to its end."""
        for number in range(steps):
            if self.random.random() < 0.3 and len(self.waiting) < 3:
                self._come()
            order = self._order()
            if order is not None:
                yield order
            assert number >= 0
        while self.waiting or self.running:
            order = self._order()
            assert order is not None, "nothing can go on"
            yield order
        assert not self.pool.owner
        assert not self.ledger.rows

    def _come(self) -> None:
        total = self.random.randint(2, self.longest)
        self.waiting.append(Request(f"r{self.made}", self.random.randint(1, min(total - 1, self.prompt)), total))
        self.made += 1

    def _order(self) -> Order | None:
        released = [request.name for request in self.running if self.ledger.position(request.name) >= request.total]
        for name in released:
            self._release(name)
            self.finished += 1
        retracted = self._retract()
        step: dict[str, Incoming] = {}
        bound: dict[str, list[int]] = {}
        left = self.tokens
        order = list(self.running)
        while left:
            if not order:
                if not self.waiting or len(self.running) >= 6 or not self.pool.free:
                    break
                request = self.waiting.popleft()
                self.running.append(request)
                self.ledger.enter([request.name])
                bound[request.name] = []
                order.append(request)
            request = order.pop(0)
            if request not in self.running:  # preempted to make room for one before it
                continue
            incoming = self._incoming(request, left)
            new = request.name in bound
            if not self._room(request, incoming.tokens, released, step, bound):
                if new:
                    self._forget(request, bound)
                    break
                continue
            step[request.name] = incoming
            left -= incoming.tokens
        if not step:
            return Order(retracted, released, {}, {}, [], {}, {}) if released or retracted else None
        due = self.ledger.due(step)
        freed = {name: blocks for name in due if (blocks := self._compact(name))}
        self.ledger.advance(step)
        resident = {name: self.ledger.resident(name) for name in step}
        for name, count in resident.items():
            self.peak = max(self.peak, count)
            if self.ledger.rows[name].compactions:
                self.peak_decoding = max(self.peak_decoding, count)
        return Order(retracted, released, bound, step, due, freed, resident)

    def _incoming(self, request: Request, left: int) -> Incoming:
        position = self.ledger.position(request.name)
        kind: Kind = "decode"
        count = 1
        if position < request.given:
            kind, count = "prompt", min(request.given - position, self.piece, left)
        elif position < request.known:
            count = min(request.known - position, self.piece, left)
        elif self.candidates and self.random.random() < 0.3:
            count = min(self.candidates, request.total - position, left)
            kind = "verify" if count > 1 else "decode"
        return Incoming(count, kind)

    def _retract(self) -> dict[str, int]:
        """Take back some of the candidates of the last step."""
        found = {}
        for request in self.running if self.candidates else []:
            counts = self.ledger.rows[request.name]
            most = min(self.candidates - 1, counts.seen - counts.floor, counts.seen - request.given)
            if counts.last == "verify" and most > 0 and self.random.random() < 0.5:
                found[request.name] = self.random.randint(1, most)
                self.ledger.retract(request.name, found[request.name])
                self.retractions += 1
        return found

    def _room(
        self, request: Request, tokens: int, released: list[str], step: dict[str, Incoming], bound: dict[str, list[int]]
    ) -> bool:
        """Take the blocks that the next tokens need; False if there are not enough. A new request makes nobody go."""
        seen = self.ledger.position(request.name) + tokens
        wanted = max(-(-seen // self.block) - len(request.table), 0)
        while wanted > len(self.pool.free):
            if request.name in bound or not self._preempt(request, released, step, bound):
                return False
        blocks = self.pool.take(request.name, wanted)
        request.table += blocks
        if blocks or request.name in bound:
            bound[request.name] = bound.get(request.name, []) + blocks
        return True

    def _preempt(
        self, request: Request, released: list[str], step: dict[str, Incoming], bound: dict[str, list[int]]
    ) -> bool:
        """Give up the newest request that has no part in this step yet; it will be read anew."""
        for victim in reversed(self.running):
            if victim is request or victim.name in step or victim.name in bound:
                continue
            victim.known = max(victim.known, self.ledger.position(victim.name))
            self._release(victim.name)
            released.append(victim.name)
            victim.table = []
            self.waiting.appendleft(victim)
            self.preemptions += 1
            return True
        return False

    def _forget(self, request: Request, bound: dict[str, list[int]]) -> None:
        del bound[request.name]
        self.running.remove(request)
        self.ledger.drop(request.name)
        self.waiting.appendleft(request)

    def _release(self, name: str) -> None:
        request = next(each for each in self.running if each.name == name)
        self.running.remove(request)
        self.pool.give_back(name, [block for block in request.table if block is not None])
        self.ledger.drop(name)

    def _compact(self, name: str) -> list[int]:
        """Count a compaction, and take back the blocks before what is left."""
        request = next(each for each in self.running if each.name == name)
        kept = self.ledger.compacted(name)
        first = live_blocks(self.ledger.position(name), kept, self.block).start
        gone = [block for block in request.table[:first] if block is not None]
        request.table[:first] = [None] * first
        self.pool.give_back(name, gone)
        self.compactions += 1
        return gone
