"""What a scheduler knows of requests under a policy: counters, and how many blocks each may come to hold.

No vLLM here. A worker runs the same ledger over the same step sizes, so that both agree on every
count and every freed block and nothing is sent between them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache

import torch

from kvpolicy.cache.blocks import live_blocks
from kvpolicy.cache.ledger import Incoming, Ledger
from kvpolicy.contracts.view import CacheView
from kvpolicy.errors import UnsupportedError
from kvpolicy.policy.policy import Policy


def incoming(seen: int, tokens: int, prompt: int) -> Incoming:
    """Return what a request's next tokens are, of which `seen` came before and `prompt` belong to its prompt."""
    if seen >= prompt:
        return Incoming(tokens)
    return Incoming(tokens, "prompt", decoded=max(seen + tokens - prompt, 0))


def spared(policy: Policy) -> Callable[[int], bool]:
    """Return what says of a prompt's length that no compaction is possible, because more is protected than is kept.

    An engine cannot refuse one request for that, so that its entries are all kept.
    """

    @cache
    def says(prompt: int) -> bool:
        budget = policy.budget.tokens
        return budget is not None and policy.reserved(prompt) > budget and _protected(policy, prompt) > budget

    return says


def _protected(policy: Policy, prompt: int) -> int:
    """Return the entries that are protected in a long row: protections may overlap, as sinks and a prompt do."""
    long = prompt + policy.reserved() + 1
    some = torch.zeros(1, 1, long, 1)
    at = torch.arange(long, dtype=torch.int32)[None, None]
    number = torch.tensor([long])
    view = CacheView(
        some, some, at, torch.ones(1, 1, long, dtype=torch.bool), 1.0, 0, 1, torch.tensor([prompt]), number, number
    )
    return int(policy.masks(view)[0].sum())


def needed(policy: Policy, longest: int, widest: int) -> int | None:
    """Return how many entries any one request may need at once; None where that is all of its tokens.

    Args:
        policy: the policy.
        longest: tokens of the longest request.
        widest: most tokens of one step.
    """
    budget, bound = policy.budget.tokens, policy.bound
    if budget is None or bound is None or spared(policy)(longest):
        return None
    entries = max(budget + min(widest, longest), bound)
    return entries if entries < longest else None


def prompt_room(
    policy: Policy, *, block: int, blocks: int, longest: int, widest: int, prompt: int | None = None
) -> int | None:
    """Return up to how many entries a prompt is held whole before it is compacted between its pieces.

    A policy that reads prompts in pieces of its own (`prefill_chunk`) says so itself: None.

    Args:
        policy: the policy.
        block: slots per block.
        blocks: blocks that requests can have, all together.
        longest: tokens of the longest request.
        widest: most tokens of one step.
        prompt: what the user says; the whole pool by default.

    Raises:
        UnsupportedError: not even what is kept and one more piece fit.
    """
    if policy.prefill_chunk is not None and policy.phase != "decode":
        return None
    least = needed(policy, longest, widest)
    if least is None:
        return longest  # vLLM itself makes sure of room for all of it
    # A row that begins within a block takes one more.
    room = min(longest, (blocks - 1) * block, longest if prompt is None else prompt)
    if room < least:
        where = f"{room} entries" if room != prompt else f"a prompt of {prompt} tokens (`prompt`)"
        raise UnsupportedError(
            f"policy {policy.name!r}: {where} cannot hold its budget of {policy.budget.tokens} and the "
            f"{min(widest, longest)} tokens that one step may bring; give vLLM {least // block + 3} blocks or more, or "
            "lower --max-num-batched-tokens."
        )
    return room


class Books:
    """Counts requests, and promises each the blocks that it may come to hold.

    A request is let in when everybody's promise can be kept with it, so that none that was let in has to be given up
    because another one grows.

    Args:
        policy: the policy.
        block: slots per block.
        blocks: blocks that requests can have, all together.
        longest: tokens of the longest request.
        widest: most tokens of one step.
        prompt: see `prompt_room`.

    Attributes:
        ledger: counts requests by their id.
        held: blocks that each holds.

    Raises:
        UnsupportedError: the pool is too small, see `prompt_room`.
    """

    def __init__(
        self, policy: Policy, *, block: int, blocks: int, longest: int, widest: int, prompt: int | None = None
    ) -> None:
        self.policy, self.block, self.blocks, self.longest = policy, block, blocks, longest
        self.room = prompt_room(policy, block=block, blocks=blocks, longest=longest, widest=widest, prompt=prompt)
        self.spared = spared(policy)
        self.ledger: Ledger[Hashable] = Ledger(policy, prompt_room=self.room, spared=self.spared)
        self.held: dict[Hashable, int] = {}
        self._prompts: dict[Hashable, int] = {}
        self._promises: dict[Hashable, int] = {}
        self._most: dict[int, int] = {}

    def __contains__(self, row: Hashable) -> bool:
        return row in self._promises

    def most(self, prompt: int) -> int:
        """Return the most blocks that a request with a prompt of so many tokens may hold at any time."""
        if prompt not in self._most:
            self._most[prompt] = min(self._found(prompt), self.blocks)
        return self._most[prompt]

    def _found(self, prompt: int) -> int:
        policy, block = self.policy, self.block
        if policy.bound is None or self.spared(prompt):
            return -(-self.longest // block)
        if self.room is None:
            return -(-policy.bound // block) + 1
        if prompt > self.room:
            return self.blocks
        # As many steps as it takes until a compaction is like an earlier one.
        ledger: Ledger[int] = Ledger(policy, prompt_room=self.room)
        ledger.advance({0: Incoming(prompt, "prompt")})
        most, first, at = -(-prompt // block), 0, 0
        known: set[tuple[int, int, int]] = set()
        step = {0: Incoming(1)}
        while (seen := ledger.position(0)) < self.longest:
            if ledger.due(step):
                kept = ledger.compacted(0)
                first = live_blocks(seen, kept, block).start
                like = kept, (seen - kept) % block, seen - at
                if like in known:
                    break
                known.add(like)
                at = seen
            ledger.advance(step)
            most = max(most, -(-(seen + 1) // block) - first)
        return most

    def wanted(self, prompt: int, tokens: int) -> int:
        """Return the blocks that must be free to let in a request, of which `tokens` tokens are known already."""
        promised = sum(max(most - self.held[row], 0) for row, most in self._promises.items())
        return min(max(self.most(prompt), -(-tokens // self.block)), self.blocks) + promised

    def enter(self, row: Hashable, prompt: int, tokens: int) -> None:
        """Let in a request, with what `wanted` was asked."""
        self._promises[row] = min(max(self.most(prompt), -(-tokens // self.block)), self.blocks)
        self._prompts[row], self.held[row] = prompt, 0
        self.ledger.enter([row])

    def compact(self, row: Hashable, seen: int) -> int:
        """Count the compaction that is due before a request has seen so many tokens, if one is.

        Returns:
            The first block that the request holds from now on, as an index into its table; 0 if none is due.
        """
        counts = self.ledger.rows[row]
        if not self.ledger.due({row: incoming(counts.seen, seen - counts.seen, self._prompts[row])}):
            return 0
        kept = self.ledger.compacted(row)
        return live_blocks(counts.seen, kept, self.block).start

    def advance(self, row: Hashable, seen: int) -> None:
        """Count a request's tokens up to `seen`; it holds the blocks for them."""
        counts = self.ledger.rows[row]
        self.ledger.advance({row: incoming(counts.seen, seen - counts.seen, self._prompts[row])})
        self.held[row] = len(live_blocks(counts.seen, counts.resident, self.block))

    def drop(self, row: Hashable) -> None:
        """Forget a request: it has finished, or was given up."""
        self.ledger.drop(row)
        for each in (self._promises, self._prompts, self.held):
            each.pop(row, None)
