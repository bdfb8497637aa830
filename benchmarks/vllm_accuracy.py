"""Does a policy answer as well in vLLM as in transformers? The shipped reasoning model, exact answers, both runtimes.

    .venv-vllm/bin/python -P benchmarks/vllm_accuracy.py --count 100

Greedy, fp32, the same problems, policy and budget; a budget is a share of the mean length of prompt and solution, in
whole blocks of 32. vLLM serves all problems of a family at once, with the armed check on, in a process of its own.
Printed are exact answers with their 95 % intervals (Wilson), and in how many problems every token is the same.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

BLOCK, INTERVAL = 32, 32


def interval(right: int, count: int) -> str:
    """Return the 95 % interval of a share, in percent (Wilson)."""
    z, share = 1.96, right / count
    middle = (share + z * z / 2 / count) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / 4 / count**2)
    return f"{100 * (middle - half):.0f} to {100 * (middle + half):.0f}"


def in_transformers(folder: str, spec: Any, prompts: Sequence[list[int]], limit: int, end: int) -> list[list[int]]:
    """Return what the transformers runtime answers, ten problems at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    from kvpolicy.runtimes.hf import generate

    model, made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    for first in range(0, len(prompts), 10):
        group = prompts[first : first + 10]
        width = max(map(len, group))
        ids = torch.tensor([[0] * (width - len(each)) + each for each in group])
        mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in group])
        with torch.inference_mode():
            output, _ = generate(
                model, {"input_ids": ids, "attention_mask": mask}, spec, max_new_tokens=limit, do_sample=False
            )
        made += [answer(each, end) for each in output[:, width:].tolist()]
    return made


def in_vllm(folder: str, said: dict[str, Any], prompts: Sequence[list[int]], limit: int, end: int) -> list[list[int]]:
    """Return what vLLM answers to all problems at once."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder, dtype="float32", max_model_len=2048, enforce_eager=True, block_size=BLOCK, max_num_seqs=64,
        enable_prefix_caching=False, disable_log_stats=True, skip_tokenizer_init=True,
        worker_cls="kvpolicy.runtimes.vllm.Worker", additional_config={"kvpolicy": said},
    )  # fmt: skip
    wish = SamplingParams(temperature=0, max_tokens=limit, stop_token_ids=[end], detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": each} for each in prompts], wish, use_tqdm=False)
    return [answer(list(each.outputs[0].token_ids), end) for each in outputs]


def own_process(own: Executor, *job: Any) -> list[list[int]]:
    """Return what vLLM answers, in a process of its own."""
    return own.submit(in_vllm, *job).result()


def answer(tokens: list[int], end: int) -> list[int]:
    """Return the tokens before the one that ends an answer."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


def main() -> None:
    """Read the command line, and print a row per family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["prompt-recall", "trace-recall"])
    parser.add_argument("--level", default="medium")
    parser.add_argument("--redundancy", type=int, help="of restated-recall: 1, 2, 4 or 8")
    parser.add_argument("--policy", default="rkv")
    parser.add_argument("--share", type=float, default=0.15)
    parser.add_argument("--count", type=int, default=100)
    asked = parser.parse_args()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "KVPOLICY_VLLM_CHECK": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    import torch
    from transformers import AutoTokenizer

    from kvpolicy.runtimes.opening import REASONER, locate
    from kvpolicy.runtimes.vllm.settings import settings
    from kvpolicy.study.tasks import grade, problems

    torch.set_num_threads(1)
    folder = str(locate(REASONER, user="the benchmark"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print("| family | budget | transformers | vLLM | same tokens | seconds |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    for family in asked.families:
        times = asked.redundancy if family == "restated-recall" else None
        chosen = list(problems(family, asked.level, "test", asked.count, redundancy=times))
        tokens = statistics.mean(len(each.prompt.split()) + len(each.solution.split()) + 2 for each in chosen)
        budget = round(asked.share * tokens / BLOCK) * BLOCK
        said = {"policy": asked.policy, "budget": budget, "set": {"trigger": {"every": INTERVAL}}}
        prompts = [tokenizer(each.prompt)["input_ids"] for each in chosen]
        limit = int(1.1 * max(len(each.solution.split()) for each in chosen))
        rest = prompts, limit, tokenizer.eos_token_id
        runs, seconds = [], []
        with ProcessPoolExecutor(1, get_context("spawn")) as own:  # an engine leaves things behind in its process
            for run in (partial(in_transformers, folder, settings(said).spec), partial(own_process, own, folder, said)):
                start = time.perf_counter()
                runs.append(run(*rest))
                seconds.append(round(time.perf_counter() - start))
        cells = []
        for run in runs:
            texts = tokenizer.batch_decode(run, skip_special_tokens=True)
            right = sum(grade(problem, text).exact for problem, text in zip(chosen, texts, strict=True))
            cells.append(f"{right}/{len(chosen)} ({interval(right, len(chosen))} %)")
        same = sum(one == other for one, other in zip(*runs, strict=True))
        row = f"| {family} | {budget} | {cells[0]} | {cells[1]} | {same}/{len(chosen)} |"
        print(f"{row} {seconds[0]} and {seconds[1]} |", flush=True)


if __name__ == "__main__":
    main()
