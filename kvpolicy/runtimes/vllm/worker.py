"""The worker class: vLLM's own for the platform, with the policy's bookkeeping around each step."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.vllm import backends, engine, metrics, words
from kvpolicy.runtimes.vllm.check import check_step
from kvpolicy.runtimes.vllm.metrics import MetricsWriter
from kvpolicy.runtimes.vllm.session import Session
from kvpolicy.runtimes.vllm.settings import armed


@cache
def worker_class() -> Any:
    """Return the worker class for this platform."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Base
    else:
        from vllm.v1.worker.gpu_worker import Worker as Base

    class Worker(Base):
        """vLLM's worker, whose requests are compacted; without a policy it does nothing else."""

        def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            with words.refusals_left_in(metrics.folder()):
                self._kvpolicy_set = engine.plan_of(vllm_config) is not None
            self._kvpolicy: Session | None = None
            if self._kvpolicy_set:
                backends.register()
                backends.forget_choices()
            super().__init__(vllm_config, *args, **kwargs)

        def get_kv_cache_spec(self) -> Any:
            specs = super().get_kv_cache_spec()
            with words.refusals_left_in(metrics.folder()):
                plan = engine.plan_of(self.vllm_config)
                if plan is None:
                    return specs
                return {name: engine.evicting_spec(each, plan) for name, each in specs.items()}

        def initialize_from_config(self, kv_cache_config: Any) -> None:
            super().initialize_from_config(kv_cache_config)
            if self._kvpolicy_set:
                with words.refusals_left_in(metrics.folder()):
                    self._kvpolicy = open_session(self, kv_cache_config)
                self._kvpolicy_metrics = writer(self.vllm_config)
                if self._kvpolicy_metrics is not None:
                    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
                    words.say_in_force(spec.plan.build(), spec.block_size, kv_cache_config.num_blocks - 1)
                    words.forget_refusal(metrics.folder())

        def execute_model(self, scheduler_output: Any) -> Any:
            if self._kvpolicy is None:
                return super().execute_model(scheduler_output)
            with torch.inference_mode():  # as the model runs: what it makes may not be written to otherwise
                self._kvpolicy.begin(scheduler_output)
            if self._kvpolicy_metrics is not None:
                self._kvpolicy_metrics.write(self._kvpolicy)
            try:
                return super().execute_model(scheduler_output)
            finally:
                self._kvpolicy.end()

    return Worker


def open_session(worker: Any, kv_cache_config: Any) -> Session:
    """Return the session of a worker whose cache vLLM has allocated, and tell its attention layers of it.

    Raises:
        UnsupportedError: a layer, its backend or the split over ranks cannot be served.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    config, groups = worker.vllm_config, kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise engine.hybrid(f"{len(groups)} groups")
    known = config.compilation_config.static_forward_context
    layers = {extract_layer_index(name): known[name] for name in groups[0].layer_names}
    model = worker.model_runner.get_model()
    opened = engine.open_cache(config, groups[0].kv_cache_spec, model, layers, kv_cache_config.num_blocks)
    session = Session(
        opened,
        {i: engine.facts_of(layer) for i, layer in layers.items()},
        batch_order(worker.model_runner),
        check=check_step if armed() else None,
    )
    for i, layer in layers.items():
        if not hasattr(type(layer.impl), "kvpolicy"):
            raise UnsupportedError(
                f"kvpolicy in vLLM: the attention backend {layer.attn_backend.get_name()} would read what was evicted; "
                f"choose one of {', '.join(backends.NAMES)} with --attention-backend."
            )
        layer.impl.kvpolicy, layer.impl.kvpolicy_layer = session, i
    return session


def writer(config: Any) -> MetricsWriter | None:
    """Return what writes a worker's numbers; None for all ranks but the first, which count the same."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    metrics.announce()
    if get_tp_group().rank_in_group or get_pp_group().rank_in_group:
        return None
    return MetricsWriter(f"worker-{config.parallel_config.data_parallel_rank}")


def batch_order(runner: Any) -> Any:
    """Return what tells the requests of the batch that a runner has prepared, in its order."""
    if hasattr(runner, "input_batch"):  # model runner V1
        return lambda: runner.input_batch.req_ids

    # Model runner V2 makes its batch anew for each step and hands it to `prepare_attn` (not run on a GPU).
    prepared: list[Any] = []
    original = runner.prepare_attn

    def prepare_attn(input_batch: Any) -> Any:
        prepared[:] = [input_batch]
        return original(input_batch)

    runner.prepare_attn = prepare_attn
    return lambda: prepared[0].req_ids if prepared else []
