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
from kvsupport.vllm_engine import run

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
    """The short part that CI runs: full would hold 12 blocks at the end."""
    asked = prompts(1, 40)
    made = run(REASONER, asked, 340, policy=small("rkv", interval=32))
    assert same_as_transformers(reasoner, small("rkv", interval=32), asked, made) == 9
    assert made["peak"] == 3


@pytest.mark.parametrize(
    "policy",
    [small("rkv-density"), small("snapkv"), small("g-kv"), small("random"), small("sinks-recent"), small("knorm"),
     small("tova", interval=None), small("h2o", interval=None), small("keydiff", prefill_chunk=None), small("lagkv"),
     small("lazy-eviction"), small("rkv-code"), small("rkv-paper"), small("recent-pinned"), small("random-pinned"),
     small("snapkv-prefill", interval=None), small("mixkv"), small("expected-attention"),
     small("rkv", selector__scope="layer"), small("rkv", selector__scope="model")],
    ids=lambda each: "-".join([each["policy"], *(str(v) for k, v in each["set"].items() if k == "selector.scope")]),
)  # fmt: skip
def test_policies_keep_what_transformers_keeps(reasoner, policy):
    """A prompt below the budget, and one above it that ends within a block."""
    pinned = policy["policy"].endswith("pinned")
    asked = [*prompts(1, 40), *prompts(1, 50 if pinned else 301)]
    made = run(REASONER, asked, 180, policy=policy)
    assert same_as_transformers(reasoner, policy, asked, made) >= (1 if "prefill" in policy["policy"] else 3)


def test_below_the_budget_nothing_changes():
    asked = prompts(3, 40)
    plain = run(REASONER, asked, 300)
    served = run(REASONER, asked, 300, policy=small("rkv", 512, 128))
    unset = run(REASONER, asked, 300, engine={"worker_cls": "kvpolicy.runtimes.vllm.Worker"})
    assert plain["tokens"] == served["tokens"] == unset["tokens"]
    assert plain["steps"] == served["steps"]
    assert plain["peak"] == served["peak"] == unset["peak"]
    assert plain["kept"] == served["kept"] == [[], [], []]


def test_many_requests_in_a_tight_pool(reasoner):
    """16 requests of 384 tokens in 65 blocks of 32: none is given up, and steps are at most half of full KV."""
    asked, policy = prompts(16, 46), small("rkv-density")
    made = run(REASONER, asked, 384, policy=policy, engine=TIGHT)
    assert same_as_transformers(reasoner, policy, asked, made) == 16 * 5
    assert made["peak"] == 64
    full = run(REASONER, asked, 384, engine=TIGHT)
    assert full["preemptions"] > 0
    assert made["steps"] <= full["steps"] / 2
    for engine, processes in ({"async_scheduling": True}, False), ({"async_scheduling": True}, True), ({}, True):
        again = run(REASONER, asked, 384, policy=policy, engine=TIGHT | engine, processes=processes)
        assert again["tokens"] == made["tokens"], (engine, processes)


def test_prompts_in_pieces_are_one_prompt(reasoner):
    asked, policy = prompts(5, 300), small("knorm")
    made = run(REASONER, asked, 150, policy=policy, engine={"max_num_batched_tokens": 128})
    assert same_as_transformers(reasoner, policy, asked, made) == 5 * 3


def test_pieces_that_a_policy_asks_for_are_compacted_between(reasoner):
    """Alone, with a prompt of whole pieces, they are the ones that transformers reads."""
    policy = small("keydiff", prefill_chunk=64)
    asked = prompts(1, 320)
    made = run(REASONER, asked, 100, policy=policy, engine={"max_num_batched_tokens": 64})
    assert len(made["kept"][0]) >= 4
    assert made["peak"] <= 5
    from kvsupport.hf_reference import generate

    tokens, kept = generate(reasoner, settings(policy).spec, asked[0], 100, piece=64)
    assert made["kept"][0] == kept
    assert made["tokens"][0] == tokens


def test_a_prompt_that_the_pool_cannot_hold_is_served_between_its_pieces():
    made = run(
        REASONER, [*prompts(1, 900), *prompts(3, 30)], 64, policy=small("rkv"),
        engine={"num_gpu_blocks_override": 12, "max_num_batched_tokens": 128},
    )  # fmt: skip
    assert [len(each) for each in made["tokens"]] == [64] * 4
    assert len(made["kept"][0]) >= 4
    assert made["peak"] <= 11
    assert (made["left"], made["preemptions"]) == (0, 0)


@pytest.mark.parametrize("scope", ["head", "model"])
def test_tensor_parallel_ranks_keep_what_one_process_keeps(scope):
    asked, policy = prompts(3, 100), small("rkv", interval=32, selector__scope=scope)
    one = run(REASONER, asked, 160, policy=policy)
    two = run(REASONER, asked, 160, policy=policy, processes=True, engine={"tensor_parallel_size": 2})
    assert two["tokens"] == one["tokens"]


def test_what_is_refused_at_start_up_says_so():
    asked = prompts(1, 8)
    for said, engine, word in (
        (small("rkv"), {"enable_prefix_caching": True}, "--no-enable-prefix-caching"),
        (small("rkv"), {"worker_cls": "auto"}, "--worker-cls kvpolicy.runtimes.vllm.Worker"),
        (small("rkv", 70, 64), {}, "budget 70 is no multiple of the block size 32, .* write 64"),
        (small("rkv"), {"num_gpu_blocks_override": 12}, "KV cache"),
    ):
        with pytest.raises(RuntimeError, match=word):
            run(REASONER, asked, 4, policy=said, engine=engine)
