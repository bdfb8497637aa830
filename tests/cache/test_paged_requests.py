"""A paged cache under a scripted scheduler keeps what every request keeps alone in an arena."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy
import kvsupport
from kvpolicy.cache.ledger import Incoming
from kvpolicy.cache.paged import unserved_traits
from kvpolicy.errors import UnsupportedError
from kvpolicy.testing.tables import stand_in_tables
from kvsupport.paged import Worker
from kvsupport.policies import small_policy
from kvsupport.scheduler import Order, Scheduler

BLOCKS, BLOCK, LONGEST = 24, 4, 70


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "registered" in metafunc.fixturenames:
        metafunc.parametrize("registered", [entry.name for entry in kvpolicy.catalog().policies()])


@pytest.fixture(autouse=True)
def _tables():
    """The shipped tables are of another model."""
    with stand_in_tables():
        yield


def run(policy, steps, *, seed=0, candidates=0, block=BLOCK, blocks=BLOCKS, piece=16, every=1, whole=False):
    """Run a script; return scheduler and worker."""
    pinned = any(type(part).__name__ == "Prompt" for part in policy.protections)
    scheduler = Scheduler(
        policy, seed, blocks=blocks, block=block, longest=LONGEST, candidates=candidates,
        piece=min(piece, policy.prefill_chunk or piece), prompt=10 if pinned else None,
    )  # fmt: skip
    worker = Worker(policy, blocks=blocks, block=block, candidates=candidates, whole=whole)
    for number, order in enumerate(scheduler.orders(steps)):
        worker.carry_out(order)
        if order.due or number % every == 0:
            worker.check(scheduler)
    assert not worker.names
    assert not any(worker.store.tables.readers(each) for each in range(blocks))
    assert sorted(scheduler.pool.free) == list(range(blocks))
    return scheduler, worker


def test_registered_policies_keep_what_a_request_keeps_alone(registered):
    policy = small_policy(registered)
    missing = unserved_traits(policy)
    if missing:
        with pytest.raises(UnsupportedError, match=f"trait {next(iter(missing))}"):
            Worker(policy, blocks=BLOCKS, block=BLOCK)
        return
    scheduler, worker = run(policy, 40, every=10)
    assert worker.compared >= (0 if policy.name == "full" else 10)
    assert worker.compared == scheduler.compactions
    assert scheduler.finished >= 8
    assert scheduler.preemptions


@pytest.mark.parametrize("name", ["knorm", "rkv", "h2o", "g-kv"])
def test_candidates_that_are_taken_back_leave_no_trace(name):
    scheduler, worker = run(small_policy(name), 60, candidates=4, every=10)
    assert scheduler.retractions >= 5
    assert worker.compared >= 10


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("block", [1, 3, 7, 16])
def test_budget_and_interval_need_not_be_multiples_of_a_block(block, whole):
    blocks = -(-LONGEST // block) + 12 // block + 4
    policy = small_policy("rkv", budget=22, interval=5)
    scheduler, worker = run(policy, 40, block=block, blocks=blocks, whole=whole)
    assert worker.compared >= 10
    assert scheduler.finished >= 8


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["knorm", "rkv", "snapkv"]), seed=st.integers(0, 2**31), block=st.integers(1, 9),
    budget=st.integers(12, 40), interval=st.integers(1, 12), piece=st.integers(1, 20),
    candidates=st.sampled_from([0, 2, 5]), whole=st.booleans(),
)  # fmt: skip
def test_any_script_keeps_what_a_request_keeps_alone(name, seed, block, budget, interval, piece, candidates, whole):
    blocks = -(-LONGEST // block) + seed % 11
    policy = small_policy(name, budget=budget, interval=interval)
    with stand_in_tables():
        run(policy, 12, seed=seed, block=block, blocks=blocks, candidates=candidates, piece=piece, every=3, whole=whole)


def test_a_request_that_is_read_anew_in_pieces_needs_no_more_room_than_before():
    """It is compacted between the pieces, so what is bounded stays so after a preemption."""
    policy = small_policy("knorm")
    scheduler, _ = run(policy, 150, every=50)
    assert scheduler.preemptions >= 5
    assert policy.bound is not None
    assert scheduler.peak <= max(policy.budget.tokens + 16, LONGEST)
    assert scheduler.peak_decoding <= policy.bound + 16


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "candidates"), [("knorm", 0), ("rkv", 3), ("h2o", 0), ("expected-attention", 0)])
def test_ten_thousand_steps(name, candidates):
    scheduler, worker = run(small_policy(name), 10_000, seed=1, candidates=candidates, every=100)
    assert worker.compared == scheduler.compactions >= 1_000
    assert scheduler.preemptions >= 100


# -- the scheduler's process ------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from dataclasses import dataclass

from kvpolicy.contracts.budget import Budget
from kvpolicy_plugins.triggers.every import Every
from kvsupport.scheduler import Order, Scheduler


@dataclass
class Schedule:
    name: str = "counted"
    budget: Budget = Budget(tokens=24)
    trigger: Every = Every(interval=8)
    phase: str = "decode"

    def entries(self, seen, prompt_length):
        return self.budget.entries(seen, 0)


scheduler = Scheduler(Schedule(), 5, blocks=24, block=4, longest=70, candidates=3)
for order in scheduler.orders(60):
    print(json.dumps({
        "released": order.released, "retracted": order.retracted, "bound": order.bound, "due": order.due,
        "step": {name: [each.tokens, each.kind] for name, each in order.step.items()},
        "freed": order.freed, "resident": order.resident,
    }))
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "transformers", "numpy")], "heavy imports"
"""


def test_a_scheduler_without_torch_counts_what_a_worker_holds():
    """Orders come from a process that never imports torch; the worker asserts every count and freed block in them."""
    support = str(Path(kvsupport.__file__).parents[1])
    paths = [support, *(entry for entry in sys.path if entry)]
    made = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    orders = [json.loads(line) for line in made.stdout.splitlines()]
    worker = Worker(small_policy("rkv"), blocks=24, block=4, candidates=3)
    for order in orders:
        step = {name: Incoming(*each) for name, each in order.pop("step").items()}
        worker.carry_out(Order(step=step, **order))
    assert sum(len(order["due"]) for order in orders) == worker.compared >= 20
    assert not worker.names
