"""Makes a policy small, so that tensors of a few slots show what it does with thousands."""

from __future__ import annotations

from dataclasses import replace

from kvpolicy.contracts.budget import Budget
from kvpolicy.policy.policy import Policy
from kvpolicy.testing.parameters import small

_MORE = 3  # entries beyond what is protected


SHARERS = 4
"""Heads in all layers of the models that laws drive."""


def protected(policy: Policy, prompt_length: int = 0) -> int:
    """Return how many entries a kept set of a small model loses to protections, for a long row with that prompt.

    Heads that share a set keep what any of them protects, and what a protection marks may differ between them.
    """
    shared = policy.selector.scope != "head"
    many = [SHARERS if shared and not p.same_for_heads else 1 for p in policy.protections]
    return sum(n * p.reserved(prompt_length) for n, p in zip(many, policy.protections, strict=True))


def small_policy(policy: Policy) -> Policy:
    """Return the policy with large integer parameters made small, and a budget a little above what it protects.

    What the policy is made of, and every choice it makes, stays; a budget that is a fraction stays too.
    """
    protections = tuple(small(p) for p in policy.protections)
    tokens = policy.budget.tokens
    reserved = protected(replace(policy, protections=protections)) if tokens is not None else 0
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
