"""What the plugin holds on to in vLLM, and whether a vLLM has it: read off its sources, without importing them.

A version of vLLM that was not run can be looked at this way before anything starts; `scripts/vllm_hooks.py` does so for
wheels and writes docs/vllm-versions.md. The arguments are those of 0.32.0.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvpolicy.runtimes.vllm.sources import Function, Sources

_TABLE = """
plugins
    reads DEFAULT_PLUGINS_GROUP
config.vllm
    reads VllmConfig.additional_config
config.parallel
    reads ParallelConfig.worker_cls

v1.attention.backends.registry
    calls register_backend(backend, class_path=None, is_mamba=False)
    reads AttentionBackendEnum.CPU_ATTN
    reads AttentionBackendEnum.FLASH_ATTN
    reads AttentionBackendEnum.TRITON_ATTN
    reads AttentionBackendEnum.FLASHINFER
v1.attention.backend
    overrides AttentionBackend.customize_spec(cls, spec)
    overrides AttentionMetadataBuilder.build(self, common_prefix_len, common_attn_metadata, fast_build=False)
    calls CommonAttentionMetadata.replace(self, **kwargs)
    reads CommonAttentionMetadata.seq_lens
    reads CommonAttentionMetadata.max_seq_len
    reads CommonAttentionMetadata.block_table_tensor
    reads CommonAttentionMetadata.num_reqs
    reads CommonAttentionMetadata.query_start_loc
    reads CommonAttentionMetadata.seq_lens_cpu_upper_bound
v1.attention.backends.cpu_attn
    overrides CPUAttentionMetadataBuilder.build(self, common_prefix_len, common_attn_metadata, fast_build=False)
    overrides CPUAttentionBackendImpl.forward(self, layer, query, key, value, kv_cache, attn_metadata, output, \
        output_scale=None, output_block_scale=None)
    calls CPUAttentionBackendImpl.do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping)
v1.attention.backends.flash_attn
    overrides FlashAttentionMetadataBuilder.build(self, common_prefix_len, common_attn_metadata, fast_build=False)
    overrides FlashAttentionImpl.forward(self, layer, query, key, value, kv_cache, attn_metadata, output, \
        output_scale=None, output_block_scale=None)
    calls FlashAttentionImpl.do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping)
v1.attention.backends.triton_attn
    overrides TritonAttentionMetadataBuilder.build(self, common_prefix_len, common_attn_metadata, fast_build=False)
    overrides TritonAttentionImpl.forward(self, layer, query, key, value, kv_cache, attn_metadata, output, \
        output_scale=None, output_block_scale=None)
    calls TritonAttentionImpl.do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping)
v1.attention.backends.flashinfer
    overrides FlashInferMetadataBuilder.build(self, common_prefix_len, common_attn_metadata, fast_build=False)
    overrides FlashInferImpl.forward(self, layer, query, key, value, kv_cache, attn_metadata, output, \
        output_scale=None, output_block_scale=None)
    calls FlashInferImpl.do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping)
v1.kv_cache_layout
    stands under KVCacheLayout

v1.kv_cache_interface
    overrides FullAttentionSpec.max_memory_usage_bytes(self, vllm_config)
    reads FullAttentionSpec.page_size_bytes
    reads KVCacheConfig.kv_cache_groups
    reads KVCacheGroupSpec.layer_names
v1.kv_cache_spec_registry
    calls KVCacheSpecRegistry._ensure_registered(cls, vllm_config=None)
    calls KVCacheSpecRegistry.register(cls, kvcache_spec_cls, manager_class=None, uniform_type_base_spec=None)
v1.core.single_type_kv_cache_manager
    overrides FullAttentionManager.__init__(self, kv_cache_spec, block_pool, enable_caching, kv_cache_group_id, \
        scheduler_block_size, dcp_world_size=1, pcp_world_size=1, needs_kv_cache_zeroing=False, \
        max_admission_blocks_per_request=None)
    overrides FullAttentionManager.get_num_blocks_to_allocate(self, request_id, num_tokens, new_computed_blocks, \
        total_computed_tokens, num_local_computed_tokens, num_tokens_main_model, apply_admission_cap=False, \
        prefill_end=0)
    overrides FullAttentionManager.allocate_new_blocks(self, request_id, num_tokens, num_tokens_main_model)
    overrides FullAttentionManager.remove_skipped_blocks(self, request_id, processed_computed_tokens, \
        num_prompt_tokens=None)
    calls FullAttentionManager._remove_blocks_in_range(self, request_id, first_block, last_block)
    overrides FullAttentionManager.pop_blocks_for_free(self, request_id)
v1.core.block_pool
    calls BlockPool.get_num_free_blocks(self)
    reads BlockPool.num_gpu_blocks
    reads BlockPool.null_block

v1.worker.cpu_worker
    overrides CPUWorker.init_device(self)
    overrides CPUWorker.execute_model(self, scheduler_output)
    overrides CPUWorker.initialize_from_config(self, kv_cache_config)
v1.worker.gpu_worker
    overrides Worker.init_device(self)
    overrides Worker.execute_model(self, scheduler_output)
    overrides Worker.initialize_from_config(self, kv_cache_config)
v1.core.sched.output
    reads SchedulerOutput.num_scheduled_tokens
    reads SchedulerOutput.scheduled_new_reqs
    reads SchedulerOutput.scheduled_cached_reqs
    reads SchedulerOutput.finished_req_ids
    reads SchedulerOutput.preempted_req_ids
    reads NewRequestData.req_id
    reads NewRequestData.num_computed_tokens
    reads NewRequestData.block_ids
    reads NewRequestData.prompt_token_ids
    reads CachedRequestData.req_ids
    reads CachedRequestData.resumed_req_ids
    reads CachedRequestData.num_computed_tokens
    reads CachedRequestData.new_block_ids
v1.worker.gpu_model_runner
    reads GPUModelRunner.input_batch
v1.worker.gpu_input_batch
    reads InputBatch.req_ids
    reads InputBatch.req_id_to_index
    reads InputBatch.block_table
v1.worker.gpu.model_runner
    overrides GPUModelRunner.prepare_attn(self, input_batch)
v1.worker.gpu.input_batch
    reads InputBatch.req_ids
    reads InputBatch.idx_mapping_np
v1.worker.gpu.block_table
    reads BlockTables.block_tables
    stands under BlockTables.gather_block_tables(self, idx_mapping, num_reqs_padded, out=None, out_ptrs=None)

v1.worker.worker_base
    stands under WorkerBase.set_kv_cache_layout(self, kv_cache_layout)
v1.core.kv_cache_utils
    stands under get_kv_cache_configs(vllm_config, kv_cache_specs, available_memory)
v1.core.kv_cache_coordinator
    stands under get_kv_cache_coordinator(kv_cache_config, max_model_len, max_in_flight_tokens, use_eagle, \
        enable_caching, enable_kv_cache_events, dcp_world_size, pcp_world_size, scheduler_block_size, \
        hash_block_size, metrics_collector=None, num_prefill_lookahead=0, allow_partial_hash_hits=True)
"""
"""By module: what the plugin does with a name there, and with which arguments. The third part is the scheduler's side,
the fourth the worker's (`v1.worker.gpu.*` is model runner V2, the other files V1), the last what calls them."""


@dataclass(frozen=True)
class Hook:
    """One thing in vLLM that the plugin relies on.

    Attributes:
        module: without the leading `vllm.`.
        use: what the plugin does with it: it *overrides*, *calls* or *reads* it, or *stands under* what it never names
            but is called through.
        name: of a function or class, or of something in a class after a dot.
        arguments: as in a `def`; None for what is not called.
    """

    module: str
    use: str
    name: str
    arguments: str | None


def _hooks() -> Iterator[Hook]:
    module = ""
    for line in _TABLE.splitlines():
        said = re.fullmatch(r" +(overrides|calls|reads|stands under) ([\w.]+)(?:\((.*)\))?", line)
        if said:
            yield Hook(module, *said.groups())
        elif line:
            module = line


HOOKS = tuple(_hooks())


class Found(NamedTuple):
    """What was found of a hook.

    Attributes:
        holds: the plugin can use it as it is.
        says: `as expected`, or what differs.
    """

    holds: bool
    says: str


def look(hook: Hook, sources: Sources) -> Found:
    """Return whether a hook is there, and what differs."""
    found = sources.find(hook.module, hook.name)
    if found is None:
        homes = sources.moved(hook.module, hook.name)
        if not homes:
            return Found(False, "missing")
        _, parts = _compare(hook, sources.find(homes[0], hook.name))
        return Found(False, " and ".join([f"moved to {', '.join(homes)}", *parts]))
    holds, parts = _compare(hook, found)
    return Found(holds, "; ".join(parts) or "as expected")


def _arguments(of: ast.arguments) -> tuple[dict[str, bool], bool]:
    """Return the arguments by name (whether they may be left out), and whether any others are taken."""
    places = [*of.posonlyargs, *of.args]
    needed = len(places) - len(of.defaults)
    named = {each.arg: i >= needed for i, each in enumerate(places)}
    named |= {each.arg: default is not None for each, default in zip(of.kwonlyargs, of.kw_defaults, strict=True)}
    return named, of.kwarg is not None


def _compare(hook: Hook, found: ast.AST | None) -> tuple[bool, list[str]]:
    """Return whether the plugin can use what was found, and how it differs from what is expected.

    What the plugin overrides passes on whatever it does not know, so that an argument more or less at the end is no
    harm; what it calls must take what it is given.
    """
    if hook.arguments is None:
        return True, []
    if not isinstance(found, Function):
        return False, ["is no function"]
    expected, _ = _arguments(ast.parse(f"lambda {hook.arguments}: 0", mode="eval").body.args)  # type: ignore[attr-defined]
    real, others = _arguments(found.args)
    lost = [name for name in expected if name not in real and not others]
    more = [name for name in real if name not in expected]
    common = [name for name in expected if name in real]
    swapped = common != [name for name in real if name in expected]
    between = bool(more and common) and list(real).index(more[0]) < list(real).index(common[-1])
    parts = [f"lost {', '.join(lost)}"] * bool(lost) + [f"gained {', '.join(more)}"] * bool(more)
    parts += ["not at the end"] * between + ["changed the order of its arguments"] * swapped
    called = hook.use == "calls"
    harmed = any(called or not expected[name] for name in lost) or any(called and not real[name] for name in more)
    return not (harmed or swapped or between), parts


def missing(path: Path) -> dict[str, str]:
    """Return the hooks that a vLLM does not have as the plugin needs them: name -> what was found.

    Args:
        path: see `Sources`.

    Raises:
        KVPolicyError: there is no vLLM there.
    """
    sources = Sources(path)
    looked = [(hook, look(hook, sources)) for hook in HOOKS if hook.use != "stands under"]
    return {f"vllm.{hook.module}.{hook.name}": found.says for hook, found in looked if not found.holds}
