"""vLLM engines in a process of their own: jobs come as JSON, and what was generated, kept and scheduled goes back.

Run by tests as ``python -P -m kvsupport.vllm_engine JOBS.json OUT.json`` in an environment that has vLLM.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING",
    "KVPOLICY_VLLM_CHECK": "1",
}  # fmt: skip
WORKER = "kvpolicy.runtimes.vllm.Worker"


def job(
    model: Path | str, prompts: list[list[int]], tokens: int | list[int], *, policy: Any = None, **engine: Any
) -> dict[str, Any]:
    """Describe what is to be generated greedily in a new engine.

    Args:
        model: a folder.
        prompts: tokens of each request.
        tokens: how many to generate, for all or each.
        policy: kvpolicy's settings; None for vLLM without.
        engine: further arguments of `vllm.LLM`.
    """
    return {"model": str(model), "prompts": prompts, "tokens": tokens, "policy": policy, "engine": engine}


def run(*jobs: dict[str, Any], processes: bool = False, timeout: float = 1800) -> list[dict[str, Any]]:
    """Do some jobs one after the other in a process of their own.

    Args:
        jobs: what `job` made.
        processes: scheduler and worker in processes of their own, too; then nothing is known but what was generated.
        timeout: seconds, for all of them.

    Returns:
        For each job `tokens` of each request, and of one process `steps`, `preemptions`, `blocks` of the pool, the
        `peak` of those that were held, the most requests that were `running` at once, `left` blocks that are held at
        the end, and `kept`: by request, the positions `[L][H][n]` after each compaction.

    Raises:
        RuntimeError: an engine failed; the message is the end of what was said.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted, made = Path(folder, "jobs.json"), Path(folder, "out.json")
        wanted.write_text(json.dumps({"jobs": jobs, "processes": processes}))
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "kvsupport.vllm_engine", str(wanted), str(made)],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                 "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes))},
            capture_output=True, text=True, check=False, timeout=timeout,
        )  # fmt: skip
        if done.returncode or not made.exists():
            raise RuntimeError((done.stdout + done.stderr)[-6000:])
        result: list[dict[str, Any]] = json.loads(made.read_text())
        return result


def main(wanted: str, made: str) -> None:
    """Do the jobs."""
    asked = json.loads(Path(wanted).read_text())
    Path(made).write_text(json.dumps([_generate(each, asked["processes"]) for each in asked["jobs"]]))


def _generate(job: dict[str, Any], processes: bool) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    options: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "max_num_seqs": 64, "block_size": 32,
        "enable_prefix_caching": False, "disable_log_stats": True, "max_num_batched_tokens": 512,
        "skip_tokenizer_init": True, "async_scheduling": False,
    }  # fmt: skip
    if job["policy"] is not None:
        options |= {"worker_cls": WORKER, "additional_config": {"kvpolicy": job["policy"]}}
    engine = LLM(job["model"], **options | job["engine"])
    found = {} if processes else _watch(engine)
    counts = job["tokens"] if isinstance(job["tokens"], list) else [job["tokens"]] * len(job["prompts"])
    wishes = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in counts]
    prompts = [{"prompt_token_ids": each} for each in job["prompts"]]
    start, cpu = time.perf_counter(), time.process_time()
    outputs = engine.generate(prompts, wishes, use_tqdm=False)
    found |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    if "pool" in found:
        pool = found.pop("pool")
        found["left"] = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    found["tokens"] = [list(each.outputs[0].token_ids) for each in outputs]
    found["kept"] = [found.get("kept", {}).get(each.request_id, []) for each in outputs]
    engine.llm_engine.engine_core.shutdown()
    del engine
    cleanup_dist_env_and_memory()
    return found


def _watch(engine: Any) -> dict[str, Any]:
    """Count steps, preemptions and blocks of an engine in this process, and note what its worker keeps."""
    core = engine.llm_engine.engine_core.engine_core
    scheduler, worker = core.scheduler, core.model_executor.driver_worker.worker
    pool = scheduler.kv_cache_manager.block_pool
    found: dict[str, Any] = {"steps": 0, "preemptions": 0, "peak": 0, "running": 0, "kept": {}, "pool": pool}
    found["blocks"] = pool.num_gpu_blocks
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        made = schedule(*args, **kwargs)
        found["steps"] += bool(made.total_num_scheduled_tokens)
        found["running"] = max(found["running"], len(scheduler.running))
        found["peak"] = max(found["peak"], pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        return made

    def given_up(*args: Any, **kwargs: Any) -> Any:
        found["preemptions"] += 1
        return preempt(*args, **kwargs)

    scheduler.schedule, scheduler._preempt_request = counted, given_up
    session = getattr(worker, "_kvpolicy", None)
    if session is not None:
        keep = session.cache.keep

        def noted(decided: Any) -> Any:
            held = keep(decided)
            for row, kept in held.items():
                # The rows' own lengths are counted by the ledger later; the store knows them now.
                from kvpolicy.cache.store.protocol import Rows

                read = [session.cache.store.read(i, Rows.of([row], [kept])) for i in session.cache.layers]
                name = str(row).partition("-")[0]  # vLLM adds random letters to a request's number
                found["kept"].setdefault(name, []).append([each.positions[0].tolist() for each in read])
            return held

        session.cache.keep = noted
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
