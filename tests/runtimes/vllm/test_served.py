"""vLLM itself, on a CPU, with the armed check on: tokens and kept positions are those of the transformers runtime.

Run by ``make test-vllm`` in an environment of its own; each engine is a process. The shipped reasoning model keeps them
short, and whatever is measured with the demo model is marked slow.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest

import kvpolicy
from kvpolicy.runtimes.vllm.settings import settings
from kvsupport.vllm_engine import job, run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(3600),
]

REASONER = Path(kvpolicy.__file__).parent / "runtimes" / "models" / "reasoner"
TIGHT = {"num_gpu_blocks_override": 65, "max_model_len": 512}


@pytest.fixture(scope="module")
def reasoner() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(REASONER, dtype=torch.float32).eval()


def small(name: str, budget: int = 64, interval: int | None = 64, **changes: Any) -> dict[str, Any]:
    """Settings of a policy at a small budget; `interval` None leaves the trigger as it is."""
    said = {} if interval is None else {"trigger": {"every": interval}}
    return {"policy": name, "budget": budget, "set": said | {k.replace("__", "."): v for k, v in changes.items()}}


def prompts(count: int, length: int, seed: int = 5) -> list[list[int]]:
    drawn = random.Random(seed)
    return [[drawn.randrange(5, 220) for _ in range(length)] for _ in range(count)]


def same_as_transformers(model: Any, policy: dict[str, Any], asked: list[list[int]], made: dict[str, Any]) -> int:
    """Compare every request's tokens and kept positions; return how many compactions there were."""
    from kvsupport.hf_reference import generate

    compactions = 0
    for i, prompt in enumerate(asked):
        tokens, kept = generate(model, settings(policy).spec, prompt, len(made["tokens"][i]))
        assert made["kept"][i] == kept, f"request {i}"
        assert made["tokens"][i] == tokens, f"request {i}"
        compactions += len(kept)
    assert made["left"] == 0
    assert made["preemptions"] == 0
    return compactions


def test_one_request_keeps_what_transformers_keeps_and_frees_the_rest(reasoner):
    """Full would hold 12 blocks at the end."""
    asked, policy = prompts(1, 40), small("rkv", interval=32)
    (made,) = run(job(REASONER, asked, 340, policy=policy))
    assert same_as_transformers(reasoner, policy, asked, made) == 9
    assert made["peak"] == 3


POLICIES = {
    name: small(name)
    for name in ("rkv-density", "snapkv", "g-kv", "random", "sinks-recent", "knorm",
                 "rkv-code", "rkv-paper", "recent-pinned", "random-pinned", "mixkv", "expected-attention")
} | {
    "tova": small("tova", interval=None), "h2o": small("h2o", interval=None),
    "lazy-eviction": small("lazy-eviction", protect__recent=16),
    "lagkv": small("lagkv", protect__sinks=4, protect__recent=16, importance__lag=16),
    "keydiff": small("keydiff", prefill_chunk=None), "snapkv-prefill": small("snapkv-prefill", interval=None),
    "mixkv-decode": small("mixkv", phase="both"),
    "rkv-layer": small("rkv", selector__scope="layer"), "rkv-model": small("rkv", selector__scope="model"),
}  # fmt: skip


def asked_of(name: str) -> list[list[int]]:
    """A prompt below the budget, and one above it that ends within a block (unless it must stay whole)."""
    return [*prompts(1, 40), *prompts(1, 50 if name.endswith("pinned") else 301)]


@pytest.fixture(scope="module")
def served() -> dict[str, dict[str, Any]]:
    """All policies, each in an engine of its own, in one process."""
    jobs = [job(REASONER, asked_of(name), 180, policy=policy) for name, policy in POLICIES.items()]
    return dict(zip(POLICIES, run(*jobs), strict=True))


@pytest.mark.parametrize("name", POLICIES)
def test_policies_keep_what_transformers_keeps(reasoner, served, name):
    compactions = same_as_transformers(reasoner, POLICIES[name], asked_of(name), served[name])
    assert compactions >= (1 if settings(POLICIES[name]).spec.phase == "prefill" else 3)


def test_a_compiled_model_keeps_what_transformers_keeps(reasoner):
    """vLLM compiles models unless it is told not to; what it compiles must read lengths and tables as they are now."""
    asked, policy = prompts(3, 40), small("rkv", interval=32)
    (made,) = run(job(REASONER, asked, 180, policy=policy, enforce_eager=False))
    assert same_as_transformers(reasoner, policy, asked, made) == 3 * 4


def test_below_the_budget_nothing_changes():
    asked = prompts(3, 40)
    plain, served, unset = run(
        job(REASONER, asked, 300), job(REASONER, asked, 300, policy=small("rkv", 512, 128)),
        job(REASONER, asked, 300, worker_cls="kvpolicy.runtimes.vllm.Worker"),
    )  # fmt: skip
    assert plain["tokens"] == served["tokens"] == unset["tokens"]
    assert plain["steps"] == served["steps"]
    assert plain["peak"] == served["peak"] == unset["peak"]
    assert plain["kept"] == served["kept"] == [[], [], []]


def test_many_requests_in_a_tight_pool(reasoner):
    """16 requests of 384 tokens in 65 blocks of 32: none is given up, and steps are at most half of full KV."""
    asked, policy = prompts(16, 46), small("rkv-density")
    wanted = job(REASONER, asked, 384, policy=policy, **TIGHT)
    ahead = job(REASONER, asked, 384, policy=policy, **TIGHT, async_scheduling=True)
    made, later, full = run(wanted, ahead, job(REASONER, asked, 384, **TIGHT))
    assert same_as_transformers(reasoner, policy, asked, made) == 16 * 5
    assert made["peak"] == 64
    assert full["preemptions"] > 0
    assert made["steps"] <= full["steps"] / 2
    for again in (later, *run(wanted, ahead, processes=True)):
        assert again["tokens"] == made["tokens"]


def test_prompts_in_pieces_are_one_prompt_unless_a_policy_asks_for_pieces(reasoner):
    """Alone, with a prompt of whole pieces, these are the ones that transformers reads."""
    from kvsupport.hf_reference import generate

    asked, one, pieces = prompts(5, 300), small("knorm"), small("keydiff", prefill_chunk=64)
    whole, cut, long = run(
        job(REASONER, asked, 150, policy=one, max_num_batched_tokens=128),
        job(REASONER, prompts(1, 320), 100, policy=pieces, max_num_batched_tokens=64),
        job(REASONER, [*prompts(1, 900), *prompts(3, 30)], 64, policy=small("rkv"), num_gpu_blocks_override=12,
            max_num_batched_tokens=128),
    )  # fmt: skip
    assert same_as_transformers(reasoner, one, asked, whole) == 5 * 3
    assert len(cut["kept"][0]) >= 4
    assert cut["peak"] <= 5
    assert (cut["tokens"][0], cut["kept"][0]) == generate(
        reasoner, settings(pieces).spec, prompts(1, 320)[0], 100, piece=64
    )
    # A prompt that the pool cannot hold is compacted between its pieces.
    assert [len(each) for each in long["tokens"]] == [64] * 4
    assert len(long["kept"][0]) >= 4
    assert (long["left"], long["preemptions"]) == (0, 0)


@pytest.mark.parametrize("scope", ["head", "model"])
def test_tensor_parallel_ranks_keep_what_one_process_keeps(scope):
    asked, policy = prompts(3, 100), small("rkv", interval=32, selector__scope=scope)
    (one,) = run(job(REASONER, asked, 160, policy=policy))
    (two,) = run(job(REASONER, asked, 160, policy=policy, tensor_parallel_size=2), processes=True)
    assert two["tokens"] == one["tokens"]


@pytest.mark.parametrize(
    ("said", "engine", "word"),
    [(small("rkv"), {"enable_prefix_caching": True}, "--no-enable-prefix-caching"),
     (small("rkv"), {"worker_cls": "auto"}, "--worker-cls kvpolicy.runtimes.vllm.Worker"),
     (small("rkv", 70, 64), {}, "budget 70 is no multiple of the block size 32, .* write 64"),
     (small("rkv"), {"num_gpu_blocks_override": 12}, "KV cache")],
    ids=["caching", "worker", "blocks", "pool"],
)  # fmt: skip
def test_what_is_refused_at_start_up_says_so(said, engine, word):
    with pytest.raises(RuntimeError, match=word):
        run(job(REASONER, prompts(1, 8), 4, policy=said, **engine))
