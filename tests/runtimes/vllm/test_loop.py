"""The plugin's two sides around a small engine: every step reads what the request would read alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy.errors import CacheStateError
from kvpolicy.runtimes.vllm.books import spared
from kvpolicy.runtimes.vllm.refusals import policy_refusal
from kvpolicy.testing.tables import stand_in_tables
from kvsupport.engine_loop import EngineLoop, Wish, wishes
from kvsupport.policies import small_policy


def served() -> list[str]:
    with stand_in_tables():
        return [e.name for e in kvpolicy.catalog().policies() if policy_refusal(kvpolicy.load(e.name).build()) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "registered" in metafunc.fixturenames:
        metafunc.parametrize("registered", served())


def test_every_served_policy_reads_what_a_request_reads_alone(registered):
    """Prompts are longer than the budget, come in pieces, and end anywhere in a block."""
    policy = small_policy(registered)
    chunk = policy.prefill_chunk if policy.phase != "decode" else None
    with stand_in_tables():
        pinned = policy.reserved(50) > policy.reserved()  # a prompt that fills the budget leaves nothing to choose
        some = wishes(6, 1, longest=90, prompt=8 if pinned else None)
        loop = EngineLoop(policy, some, blocks=40, block=4, widest=chunk or 24)
        loop.run()
    assert loop.compared >= 60
    assert loop.session.counts.compactions >= {"full": 0}.get(policy.name, 2)


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(["knorm", "rkv", "snapkv", "h2o", "snapkv-prefill"]), seed=st.integers(0, 2**31),
    block=st.integers(1, 9), budget=st.integers(12, 40), interval=st.integers(1, 12), widest=st.integers(2, 40),
    spare=st.integers(0, 30),
)  # fmt: skip
def test_any_pool_serves_every_request_and_gives_none_up(name, seed, block, budget, interval, widest, spare):
    """Blocks need not divide anything; the pool is as small as start-up lets it be, or somewhat larger."""
    policy, longest = small_policy(name, budget=budget, interval=interval), 70
    entries = longest if policy.bound is None else min(max(budget + min(widest, longest), policy.bound), longest)
    blocks = -(-entries // block) + 3 + spare
    loop = EngineLoop(policy, wishes(6, seed, longest=longest), blocks=blocks, block=block, widest=widest, seed=seed)
    loop.run()
    assert loop.peak < blocks


def test_freed_blocks_let_more_requests_run():
    """8 requests of 64 tokens in a pool for half of them: a step for each token, and no waiting."""
    steps = {}
    for name in ("knorm", "full"):
        some = [Wish(f"r{i}", 9, 64, 64) for i in range(8)]
        loop = EngineLoop(small_policy(name, budget=16, interval=16), some, blocks=33, block=8, widest=256)
        loop.run()
        steps[name] = loop.steps
        assert loop.peak == 32
    assert steps["knorm"] == 64 - 9 + 1
    assert steps["full"] == 2 * steps["knorm"]


def test_a_prompt_that_the_pool_cannot_hold_is_compacted_between_its_pieces():
    policy = small_policy("rkv", budget=16, interval=8)
    loop = EngineLoop(policy, [Wish("r0", 300, 320, 320), Wish("r1", 20, 60, 60)], blocks=9, block=8, widest=16)
    loop.run()
    assert loop.peak <= 8
    assert loop.session.counts.compactions >= 15
    assert loop.compared >= 40, "the short one is as alone"


def test_what_the_scheduler_and_the_worker_count_must_agree():
    loop = EngineLoop(small_policy("rkv"), [Wish("r0", 30, 60, 60)], blocks=20, block=4, widest=64)
    for _ in range(3):
        loop._step()
    loop.session.cache.ledger.rows["r0"].seen -= 1
    with pytest.raises(CacheStateError, match=r"'r0': vLLM has computed 32 tokens, but 31 were counted"):
        loop._step()


@pytest.mark.parametrize("what", ["table", "block", "entry"])
def test_the_armed_check_sees(what):
    loop = EngineLoop(
        small_policy("knorm"), [Wish("r0", 30, 60, 60), Wish("r1", 30, 60, 60)], blocks=40, block=4, widest=64
    )
    for _ in range(8):
        loop._step()
    tables = loop.store.tables
    said = "this is a fault of kvpolicy"
    if what == "table":
        loop.running[0].table[-1] = loop.running[1].table[-1]
        said = "vLLM reads blocks"
    elif what == "block":
        tables["r1"].blocks[0] = tables["r0"].live[-1]
        said = "is also that of"
    else:
        loop.store._keys[0][tables["r0"].live[0], 0] = float("nan")
        said = "not finite"
    with pytest.raises(CacheStateError, match=said):
        loop._step()


def test_a_prompt_that_must_stay_whole_and_does_not_fit_the_budget_is_kept_whole():
    """One request cannot be refused, and must not stop the others; protections that overlap count once."""
    protect = {"prompt": True, "sinks": 4, "recent": 4}
    policy = kvpolicy.load("random", 24, trigger__interval=8, protect=protect).build()
    assert policy.reserved(20) == 28
    assert [prompt for prompt in range(30) if spared(policy)(prompt)] == list(range(21, 30))
    loop = EngineLoop(policy, [Wish("r0", 50, 80, 80), Wish("r1", 20, 60, 60)], blocks=60, block=4, widest=80)
    loop.run()
    assert loop.session.counts.compactions == 4, "those of the second alone"
    assert loop.compared == 41
