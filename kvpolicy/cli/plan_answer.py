"""What comes out of a plan: rows that fit, without and with a policy, and what is gained at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import kvpolicy
from kvpolicy.cli.capacity import Machine, Roofline, RowNeeds, row_under, rows_that_fit, whole_row
from kvpolicy.cli.memory import ModelShape
from kvpolicy.cli.modelsize import ModelSize
from kvpolicy.cli.pool import PoolPlan, pool_plan
from kvpolicy.errors import KVPolicyError
from kvpolicy.policy.policy import Policy


@dataclass(frozen=True)
class PlanQuestion:
    """What is asked: a policy, a model, a machine, and a text of so many tokens, some of which are the prompt."""

    name: str
    policy: Policy
    shape: ModelShape
    size: ModelSize
    machine: Machine
    length: int
    prompt: int


@dataclass(frozen=True)
class CapacityPlan:
    """What was asked, and what comes out; `full` is the whole cache.

    Attributes:
        asked: policy, model, machine and text.
        full, under: what a row takes.
        full_rows, rows: how many fit, in transformers.
        pool: the same in vLLM.
        speeds: by batch, tokens per second (or ratios) without and with the policy.
        arithmetic_from: rows from which on a step is bound by arithmetic, without and with the policy.
        longest_full: tokens of the longest row that fits whole.
    """

    asked: PlanQuestion
    full: RowNeeds
    under: RowNeeds
    full_rows: int
    rows: int
    pool: PoolPlan
    speeds: dict[str, tuple[int, float, int, float]]
    arithmetic_from: tuple[int | None, int | None]
    longest_full: int

    def as_json(self) -> dict[str, Any]:
        """Return the numbers."""
        asked, pool = self.asked, self.pool
        known = asked.machine.bandwidth is not None
        sides = {"full": (self.full, self.full_rows), "policy": (self.under, self.rows)}
        return {
            "policy": asked.name,
            "length": asked.length,
            "prompt": asked.prompt,
            "bytes_per_token": asked.shape.bytes_per_token,
            "weights_bytes": asked.size.weights,
            "parameters": asked.size.parameters or None,
            "cache_bytes": asked.machine.cache,
            **{
                side: {
                    "entries_at_most": needs.course.peak, "entries_mean": needs.course.mean,
                    "compactions": needs.course.compactions, "bytes_resident_at_most": needs.keys_values,
                    "bytes_allocated_at_most": needs.allocated, "bytes_beside_at_most": needs.beside,
                    "bytes_state": needs.state, "rows": rows,
                }
                for side, (needs, rows) in sides.items()
            },
            "vllm": {"block_size": pool.block, "blocks": pool.blocks, "full_blocks": pool.full,
                     "full_rows": pool.full_rows, "policy_blocks": pool.most, "rows": pool.rows,
                     "refused": pool.refused},
            "gains": {name: fast / slow for name, (_, slow, _, fast) in self.speeds.items()},
            "tokens_per_second_at_most": {
                name: {"full_rows": a, "full": slow, "rows": b, "policy": fast}
                for name, (a, slow, b, fast) in self.speeds.items()
            } if known else None,
            "bound_by_arithmetic_from_rows": dict(zip(("full", "policy"), self.arithmetic_from, strict=True)),
            "longest_full_row": self.longest_full,
        }  # fmt: skip


def answer_of(asked: PlanQuestion, block: int) -> CapacityPlan:
    """Count; raises KVPolicyError when not one row fits.

    Args:
        asked: what is asked.
        block: slots per block of vLLM.
    """
    shape, size, machine, text = asked.shape, asked.size, asked.machine, (asked.length, asked.prompt)
    whole = kvpolicy.load("full").build()
    full = whole_row(whole, shape, size, *text)
    under = full if asked.policy.budget.fraction == 1.0 else row_under(asked.policy, shape, size, *text)
    full_rows, rows = rows_that_fit(full, machine), rows_that_fit(under, machine)
    if not max(full_rows, rows):
        raise KVPolicyError(
            f"--length: not one row of {asked.length:,} tokens fits into {machine.cache:,} bytes: the whole cache "
            f"takes {full.total:,}, and {asked.name}'s {under.total:,}; give more memory, or a smaller --budget."
        )
    roof, speeds = Roofline(machine, shape, size), {}

    def speed(name: str, whole_rows: int, policy_rows: int) -> None:
        slow = roof.tokens_per_second(whole_rows, full, asked.prompt)
        speeds[name] = whole_rows, slow, policy_rows, roof.tokens_per_second(policy_rows, under, asked.prompt)

    if asked.length > asked.prompt and full_rows:
        speed("one row", 1, 1)
        if min(full_rows, rows) > 1:
            speed("the same rows", min(full_rows, rows), min(full_rows, rows))
        if rows:
            speed("the largest batches", full_rows, rows)
    room = machine.cache - full.state
    return CapacityPlan(
        asked, full, under, full_rows, rows, pool_plan(asked.policy, shape, machine, block, *text), speeds,
        (roof.bound_by_arithmetic(full), roof.bound_by_arithmetic(under)), max(room, 0) // shape.bytes_per_token,
    )  # fmt: skip
