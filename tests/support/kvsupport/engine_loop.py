"""A small engine that schedules, packs and reads as vLLM does, around the plugin's own books and session.

Requests wait in a queue and are let in by `Books`; a step computes one token of each that decodes and pieces of prompts
up to a number of tokens; keys are stored at the slots, and attention reads the blocks and lengths, that are in vLLM's
metadata once the plugin has seen it. One arena engine per request, driven alone with its prompt in one piece, says what
must be read.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvpolicy import Policy
from kvpolicy.cache.ledger import Incoming
from kvpolicy.cache.paged import PagedCache
from kvpolicy.cache.store import Layout
from kvpolicy.cache.store.paged import PagedStore
from kvpolicy.runtimes.vllm import backends
from kvpolicy.runtimes.vllm.backends import without_evicted
from kvpolicy.runtimes.vllm.books import Books
from kvpolicy.runtimes.vllm.check import check_step
from kvpolicy.runtimes.vllm.session import Session
from kvsupport.paged import DIM, FACTS, HEADS, LAYERS, MODEL_LAYERS, ROPES, VALUE_DIM, RowAlone, text


@dataclass
class Wish:
    """A request: its prompt's tokens and all of its tokens; it is cut off after `until`."""

    name: str
    prompt: int
    total: int
    until: int
    seen: int = 0
    table: list[int] = field(default_factory=list)


class EngineLoop:
    """The engine.

    Attributes:
        peak: most blocks that were held at once.
        compared: steps of requests whose reading was compared with the request alone.
        steps: how many there were.
    """

    def __init__(
        self, policy: Policy, wishes: list[Wish], *, blocks: int, block: int, widest: int, seed: int = 0
    ) -> None:
        self.policy, self.block, self.widest, self.random = policy, block, widest, Random(seed)
        longest = max(each.total for each in wishes)
        self.books = Books(policy, block=block, blocks=blocks - 1, longest=longest, widest=widest)
        self.free = deque(range(1, blocks))
        self.waiting, self.running = deque(wishes), list[Wish]()
        layout = Layout(LAYERS, HEADS, DIM, VALUE_DIM, torch.float32, torch.device("cpu"), policy.slot_states)
        self.store = PagedStore.allocate(layout, blocks, block, whole_blocks=True)
        for pages in (*self.store._keys.values(), *self.store._values.values()):
            pages[1:] = float("nan")  # whoever reads what was not written sees it
        cache = PagedCache(
            policy, self.store, MODEL_LAYERS, ROPES, prompt_room=self.books.room, spared=self.books.spared
        )
        self.order: list[Wish] = []
        facts = dict.fromkeys(LAYERS, FACTS)
        self.session = Session(cache, facts, lambda: [each.name for each in self.order], check_step)
        self.alone: dict[str, RowAlone] = {}
        self.finished: set[str] = set()
        self.peak = self.compared = self.steps = 0

    def run(self) -> None:
        """Go on until every request has finished."""
        while self.waiting or self.running:
            self._step()
        assert not self.books.held
        assert len(self.free) == self.store.tables.blocks - 1

    def _step(self) -> None:
        left, scheduled, new = self.widest, dict[str, int](), dict[str, list[int]]()
        computed = {each.name: each.seen for each in self.running}
        fresh: list[Wish] = []
        for wish in self.running:
            tokens = min(wish.prompt - wish.seen if wish.seen < wish.prompt else 1, left)
            if tokens:
                new[wish.name] = self._allocate(wish, wish.seen + tokens)
                scheduled[wish.name] = tokens
                left -= tokens
        while self.waiting and left:
            wish = self.waiting[0]
            tokens = min(wish.prompt, left)
            if self.books.wanted(wish.prompt, tokens) > len(self.free):
                break
            self.running.append(self.waiting.popleft())
            fresh.append(wish)
            self.books.enter(wish.name, wish.prompt, tokens)
            new[wish.name] = self._allocate(wish, tokens)
            scheduled[wish.name] = tokens
            left -= tokens
        assert scheduled, "nothing can go on"
        self.peak = max(self.peak, self.store.tables.blocks - 1 - len(self.free))
        cached = [each for each in self.running if each.name in scheduled and each not in fresh]
        ordered = SimpleNamespace(
            finished_req_ids=self.finished, num_scheduled_tokens=scheduled,
            scheduled_new_reqs=[
                SimpleNamespace(req_id=w.name, prompt_len=w.prompt, block_ids=(new[w.name],), num_computed_tokens=0)
                for w in fresh
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[w.name for w in cached], resumed_req_ids=set(),
                num_computed_tokens=[computed[w.name] for w in cached],
                new_block_ids=[(new[w.name],) if new[w.name] else None for w in cached],
            ),
        )  # fmt: skip
        self.finished = set()
        self._compute(ordered)
        self.steps += 1
        for wish in list(self.running):
            wish.seen += scheduled.get(wish.name, 0)
            if wish.seen >= wish.until:
                self.running.remove(wish)
                self.finished.add(wish.name)
                self.books.drop(wish.name)
                self.free += [block for block in wish.table if block]
                self.alone.pop(wish.name, None)

    def _allocate(self, wish: Wish, seen: int) -> list[int]:
        """What the manager does for one request of a step."""
        first = self.books.compact(wish.name, seen)
        self.free += [block for block in wish.table[:first] if block]
        wish.table[:first] = [0] * first
        more = -(-seen // self.block) - len(wish.table)
        assert more <= len(self.free), "a request that was let in cannot go on"
        blocks = [self.free.popleft() for _ in range(more)]
        wish.table += blocks
        self.books.advance(wish.name, seen)
        assert self.books.held[wish.name] <= sum(map(bool, wish.table)) <= self.books.most(wish.prompt)
        return blocks

    def _compute(self, ordered: Any) -> None:
        """What a worker does: the batch in an order of its own, tokens stored, everything read."""
        self.session.begin(ordered)
        scheduled = ordered.num_scheduled_tokens
        self.order = [each for each in self.running if each.name in scheduled]
        self.random.shuffle(self.order)
        starts, slots, width = [0], list[int](), max(len(each.table) for each in self.order)
        for wish in self.order:
            starts.append(starts[-1] + scheduled[wish.name])
            slots += [
                wish.table[p // self.block] * self.block + p % self.block
                for p in range(wish.seen, wish.seen + scheduled[wish.name])
            ]
        told = Told(
            block_table_tensor=torch.tensor([each.table + [0] * (width - len(each.table)) for each in self.order]),
            seq_lens=torch.tensor([each.seen + scheduled[each.name] for each in self.order], dtype=torch.int32),
            slot_mapping=torch.tensor(slots), query_start_loc_cpu=torch.tensor(starts), max_seq_len=0,
        )  # fmt: skip
        shared = told.slot_mapping
        told = without_evicted(self.session, told)
        at = [range(each.seen, each.seen + scheduled[each.name]) for each in self.order]
        for i, layer in enumerate(LAYERS):
            parts = [
                [t[i][:, span].transpose(0, 1) for t in text(w.name)] for w, span in zip(self.order, at, strict=True)
            ]
            keys, values, queries = (torch.cat(part) for part in zip(*parts, strict=True))
            self.store._keys[layer].flatten(0, 1)[shared] = keys
            self.store._values[layer].flatten(0, 1)[shared] = values
            self.session.record(layer, queries)
        self.session.end()
        assert backends.without_evicted(self.session, told) is told, "a batch that is made up"
        for i, wish in enumerate(self.order):
            self._compare(wish, scheduled[wish.name], told.block_table_tensor[i], int(told.seq_lens[i]))

    def _compare(self, wish: Wish, tokens: int, blocks: Tensor, length: int) -> None:
        """What attention reads of a request is what it would read alone."""
        alone = self.alone.setdefault(wish.name, RowAlone(self.policy, wish.name))
        seen = wish.seen + tokens
        if self.books.spared(wish.prompt):
            assert length == seen
            return
        if self.books.room is None:  # the policy means pieces
            alone.feed(Incoming(tokens, "prompt" if seen <= wish.prompt else "decode"))
        elif seen < wish.prompt or self.books.room < wish.prompt:
            return
        else:
            alone.feed(Incoming(wish.prompt, "prompt") if seen == wish.prompt else Incoming(tokens))
        slots = torch.arange(length)
        head = torch.arange(HEADS)[:, None]
        for i, (layer, wanted) in enumerate(zip(LAYERS, alone.positions(), strict=True)):
            at = blocks[slots // self.block], slots % self.block
            assert self.store.positions[i][at].T.tolist() == wanted, (wish, layer)
            if not self.policy.post:  # else what is kept may be changed, alone as well as here
                read = self.store._keys[layer][at].transpose(0, 1)
                assert torch.equal(read, text(wish.name).keys[i][head, torch.tensor(wanted)]), (wish, layer)
        self.compared += 1


class Told(SimpleNamespace):
    """What vLLM tells builders of a batch (CommonAttentionMetadata), as far as the plugin reads it."""

    def replace(self, **changes: Any) -> Told:
        """Return a changed copy."""
        return Told(**{**vars(self), **changes})


def wishes(count: int, seed: int, *, longest: int, prompt: int | None = None) -> list[Wish]:
    """Return random requests, some of which are cut off early."""
    random, made = Random(seed), []
    for number in range(count):
        total = random.randint(2, longest)
        most = min(total - 1, longest if prompt is None else prompt)
        wish = Wish(f"r{number}", random.randint(1, most), total, total)
        if random.random() < 0.2:
            wish.until = random.randint(1, total)
        made.append(wish)
    return made
