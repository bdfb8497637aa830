"""A soak: many requests of random lengths, some aborted, in a pool that is too small; nothing may go wrong or be left.

``python -P -m kvsupport.vllm_soak --requests 500`` in an environment that has vLLM prints what happened as JSON and
fails when an answer is not the one that its request gets alone, a block is left, or memory grows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from kvsupport.vllm_engine import ENVIRONMENT, WORKER

LONGEST, PROMPTS, BLOCKS, STUCK = 420, 40, 26, 3_000
POLICY = {"policy": "rkv", "budget": 64, "set": {"trigger": {"every": 64}}}


def options(model: str, blocks: int, policy: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of an engine."""
    return {
        "model": model, "dtype": "float32", "max_model_len": 512, "enforce_eager": True, "max_num_seqs": 32,
        "block_size": 32, "enable_prefix_caching": False, "disable_log_stats": True, "max_num_batched_tokens": 256,
        "skip_tokenizer_init": True, "async_scheduling": True, "num_gpu_blocks_override": blocks,
        "worker_cls": WORKER, "additional_config": {"kvpolicy": policy},
    }  # fmt: skip


Wished = tuple[str, list[int], int, int]


def drive(engine: Any, wishes: list[Wished], random: Random) -> tuple[dict[str, list[int]], int]:
    """Send requests (name, prompt, tokens, tokens after which it is aborted; 0 for never), a few per step.

    Returns:
        The answers of those that finished, and how many steps it took.
    """
    from vllm import SamplingParams

    waiting, until, steps = list(wishes), dict[str, int](), 0
    made: dict[str, list[int]] = {}
    while waiting or engine.has_unfinished_requests():
        for _ in range(random.randint(0, 3) if len(wishes) > 1 else 1):
            if waiting:
                name, prompt, count, stop = waiting.pop(0)
                params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
                engine.add_request(name, {"prompt_token_ids": prompt}, params)
                until[name] = stop
                if random.random() < 0.02 and len(wishes) > 1:  # the client is gone before anything was computed
                    engine.abort_request([name])
        steps += 1
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
            if output.finished and output.outputs[0].finish_reason == "length":
                made[output.request_id] = tokens
            elif until.get(output.request_id) and len(tokens) >= until[output.request_id]:
                engine.abort_request([output.request_id])
        assert steps < STUCK * max(len(wishes) / 20, 1), "requests are stuck"
    return made, steps


def main() -> None:
    """Soak, and say what happened."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=None)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    import kvpolicy

    model = asked.model or str(Path(kvpolicy.__file__).parent / "runtimes" / "models" / "reasoner")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    random = Random(asked.seed)
    lengths = [random.choice([3, 40, 63, 64, 65, 128, 129, 200]) for _ in range(PROMPTS)]
    prompts = [[random.randrange(5, 220) for _ in range(length)] for length in lengths]
    engine = LLMEngine.from_engine_args(EngineArgs(**options(model, BLOCKS, POLICY)))
    core = engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    tokens = [random.randint(1, LONGEST - len(prompt)) for prompt in prompts]
    singles = [drive(engine, [(f"alone{i}", prompts[i], tokens[i], 0)], random)[0][f"alone{i}"] for i in range(PROMPTS)]
    wishes, asked_of = [], {}
    # Half as many again: what vLLM itself allocates lately has come by then, and memory must stay where it is.
    for i in range(asked.requests + asked.requests // 2):
        which = random.randrange(PROMPTS)
        count = random.randint(1, tokens[which])
        stop = random.randint(1, count) if random.random() < 0.2 else 0
        wishes.append((f"r{i}", prompts[which], count, stop))
        asked_of[f"r{i}"] = which, count
    given_up: list[Any] = []
    preempt = core.scheduler._preempt_request

    def noted(*args: Any, **kwargs: Any) -> Any:
        given_up.append(args)
        return preempt(*args, **kwargs)

    core.scheduler._preempt_request = noted
    start = time.perf_counter()
    answers, steps = drive(engine, wishes[: asked.requests], random)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    more, later = drive(engine, wishes[asked.requests :], random)
    answers |= more
    wrong = [name for name, made in answers.items() if made != singles[asked_of[name][0]][: asked_of[name][1]]]
    found = {
        "requests": len(wishes), "finished": len(answers), "wrong": wrong, "steps": steps + later,
        "preemptions": len(given_up), "left": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        "known": len(core.scheduler.kv_cache_manager.coordinator.single_type_managers[0].books.held),
        "grown": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / before - 1,
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    print(json.dumps(found))
    sound = not wrong and not found["left"] and not found["known"] and not given_up and found["grown"] < 0.02
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
