"""Makes a policy small, so that tensors of a few slots show what it does with thousands."""

from __future__ import annotations

from dataclasses import replace

from kvpolicy.contracts.budget import Budget
from kvpolicy.policy.policy import Policy
from kvpolicy.testing.parameters import small

_MORE = 3  # entries beyond what is protected


def small_policy(policy: Policy) -> Policy:
    """Return the policy with large integer parameters made small, and a budget a little above what it protects.

    What the policy is made of, and every choice it makes, stays; a budget that is a fraction stays too.
    """
    protections = tuple(small(p) for p in policy.protections)
    reserved = sum(p.reserved() for p in protections)
    tokens = policy.budget.tokens
    budget = policy.budget if tokens is None else Budget(tokens=min(tokens, reserved + _MORE))
    chunk = policy.prefill_chunk
    return replace(
        policy,
        budget=budget,
        trigger=small(policy.trigger),
        importance=small(policy.importance),
        redundancy=small(policy.redundancy),
        mixer=small(policy.mixer),
        allocator=small(policy.allocator),
        selector=small(policy.selector),
        protections=protections,
        post=tuple(small(p) for p in policy.post),
        prefill_chunk=None if chunk is None else min(chunk, _MORE + 1),
    )
