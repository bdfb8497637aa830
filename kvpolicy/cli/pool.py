"""How many requests vLLM's pool of blocks holds at once, counted as the plugin's own books count them; no vLLM here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvpolicy.cli.capacity import Machine
from kvpolicy.cli.memory import ModelShape
from kvpolicy.errors import UnsupportedError
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.vllm.books import Books
from kvpolicy.runtimes.vllm.refusals import block_refusal, policy_refusal

STEP_TOKENS: Final = 2048
"""Tokens of a step at most (`--max-num-batched-tokens`), of which it hangs how small a pool may be."""


@dataclass(frozen=True)
class PoolPlan:
    """A pool of blocks.

    Attributes:
        block: slots per block.
        blocks: blocks of the pool; vLLM keeps one of them for itself.
        full: blocks of a request at its longest, without eviction.
        most: blocks that a request may ever hold under the policy; None where it is not served.
        refused: why it is not.
    """

    block: int
    blocks: int
    full: int
    most: int | None
    refused: str | None = None

    @property
    def full_rows(self) -> int:
        """Requests that fit at once without eviction, all at their longest."""
        return max(self.blocks - 1, 0) // self.full

    @property
    def rows(self) -> int | None:
        """Requests that are let in at once under the policy."""
        return None if self.most is None else max(self.blocks - 1, 0) // self.most


def pool_plan(policy: Policy, shape: ModelShape, machine: Machine, block: int, length: int, prompt: int) -> PoolPlan:
    """Count the blocks of a pool, and those of requests of so many tokens, `prompt` of which are the prompt."""
    blocks, full = machine.cache // (block * shape.bytes_per_token), -(-length // block)
    refused = policy_refusal(policy) or block_refusal(policy, block)
    if refused is None and (shape.others or shape.unlike):
        refused = "the plugin serves models whose layers are all of full attention with the same heads."
    if refused is not None:
        return PoolPlan(block, blocks, full, None, refused)
    try:
        books = Books(policy, block=block, blocks=blocks - 1, longest=length, widest=min(STEP_TOKENS, length))
    except UnsupportedError as error:
        return PoolPlan(block, blocks, full, None, str(error))
    return PoolPlan(block, blocks, full, books.most(prompt))
