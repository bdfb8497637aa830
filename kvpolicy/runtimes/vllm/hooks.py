"""What the plugin holds on to in vLLM, and whether a vLLM has it: read off its sources, without importing them.

A version of vLLM that was not run can be looked at this way before anything starts; `scripts/vllm_hooks.py` does so for
wheels and writes docs/vllm-versions.md.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvpolicy.runtimes.vllm.sources import Function, Sources

_BACKEND = """\
v1.attention.backends.{module}
    overrides {name}Backend.get_impl_cls()
    overrides {name}Backend.get_builder_cls()
    overrides {name}MetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, *args, **kwargs)
    overrides {name}MetadataBuilder.build(self, common_prefix_len, common_attn_metadata, *args, **kwargs)
    overrides {impl}.forward(self, layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
    calls {impl}.do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping)
    reads {impl}.num_heads
    reads {impl}.num_kv_heads
    reads {impl}.head_size
    reads {impl}.scale
"""
_BACKENDS = (
    ("cpu_attn", "CPUAttention", "CPUAttentionBackendImpl"),
    ("flash_attn", "FlashAttention", "FlashAttentionImpl"),
    ("triton_attn", "TritonAttention", "TritonAttentionImpl"),
    ("flashinfer", "FlashInfer", "FlashInferImpl"),
)
_TABLE = """
plugins
    reads DEFAULT_PLUGINS_GROUP
platforms
    reads current_platform
utils.import_utils
    calls resolve_obj_by_qualname(qualname)
config
    calls get_current_vllm_config_or_none()
config.vllm
    reads VllmConfig.additional_config
    reads VllmConfig.speculative_config
    reads VllmConfig.kv_transfer_config
config.parallel
    reads ParallelConfig.worker_cls
    reads ParallelConfig.pipeline_parallel_size
    reads ParallelConfig.decode_context_parallel_size
    reads ParallelConfig.prefill_context_parallel_size
config.cache
    reads CacheConfig.enable_prefix_caching
    reads CacheConfig.cache_dtype
config.scheduler
    reads SchedulerConfig.max_num_batched_tokens
config.model
    reads ModelConfig.max_model_len
    reads ModelConfig.use_mla
    calls ModelConfig.get_total_num_kv_heads(self)
    calls ModelConfig.get_total_num_hidden_layers(self)
config.compilation
    reads CompilationConfig.static_forward_context
    reads CompilationConfig.cudagraph_mode
    calls CUDAGraphMode.has_full_cudagraphs(self)

v1.attention.selector
    reads _cached_get_attn_backend
v1.attention.backends.registry
    calls register_backend(backend, class_path)
    calls AttentionBackendEnum.get_path(self)
    reads AttentionBackendEnum.CPU_ATTN
    reads AttentionBackendEnum.FLASH_ATTN
    reads AttentionBackendEnum.TRITON_ATTN
    reads AttentionBackendEnum.FLASHINFER
v1.attention.backend
    calls CommonAttentionMetadata.replace(self, **kwargs)
    reads CommonAttentionMetadata.block_table_tensor
    reads CommonAttentionMetadata.slot_mapping
    reads CommonAttentionMetadata.seq_lens
    reads CommonAttentionMetadata.max_seq_len
    reads CommonAttentionMetadata.query_start_loc_cpu
    reads CommonAttentionMetadata.seq_lens_cpu_upper_bound
{backends}v1.kv_cache_layout
    stands under KVCacheLayout
model_executor.layers.attention.attention
    reads Attention.impl
    reads Attention.attn_backend
    reads Attention.kv_cache
    reads Attention.layer_name
model_executor.layers.rotary_embedding.base
    reads RotaryEmbedding.is_neox_style
    reads RotaryEmbedding.base
    calls RotaryEmbedding._compute_inv_freq(self, base)
model_executor.models.utils
    calls extract_layer_index(layer_name)
distributed.parallel_state
    calls get_tp_group()
    calls get_pp_group()
    reads GroupCoordinator.device_group
    reads GroupCoordinator.rank_in_group
    reads GroupCoordinator.world_size

v1.kv_cache_interface
    overrides FullAttentionSpec.max_memory_usage_bytes(self, vllm_config)
    overrides FullAttentionSpec.merge(cls, specs)
    reads FullAttentionSpec.page_size_bytes
    reads FullAttentionSpec.num_kv_heads
    reads FullAttentionSpec.head_size
    reads FullAttentionSpec.head_size_v
    reads KVCacheConfig.kv_cache_groups
    reads KVCacheConfig.num_blocks
    reads KVCacheGroupSpec.kv_cache_spec
    reads KVCacheGroupSpec.layer_names
v1.kv_cache_spec_registry
    calls KVCacheSpecRegistry._ensure_registered(cls)
    calls KVCacheSpecRegistry.register(cls, kvcache_spec_cls, manager_class, uniform_type_base_spec)
v1.core.single_type_kv_cache_manager
    overrides FullAttentionManager.__init__(self, kv_cache_spec, *args, **kwargs)
    overrides FullAttentionManager.get_num_blocks_to_allocate(self, request_id, num_tokens, *args, **kwargs)
    overrides FullAttentionManager.allocate_new_blocks(self, request_id, num_tokens, *args, **kwargs)
    overrides FullAttentionManager.remove_skipped_blocks(self, request_id, processed_computed_tokens, \
        num_prompt_tokens=None)
    overrides FullAttentionManager.pop_blocks_for_free(self, request_id)
    calls FullAttentionManager._remove_blocks_in_range(self, request_id, first_block, last_block)
    reads FullAttentionManager.req_to_blocks
    reads FullAttentionManager.block_pool
v1.core.block_pool
    calls BlockPool.get_num_free_blocks(self)
    reads BlockPool.num_gpu_blocks
v1.core.kv_cache_utils
    reads KVCacheBlock.block_id
    reads KVCacheBlock.is_null
    stands under get_kv_cache_configs(vllm_config, kv_cache_specs, available_memory)
v1.core.kv_cache_coordinator
    stands under get_kv_cache_coordinator(kv_cache_config, max_model_len, max_in_flight_tokens, use_eagle, \
        enable_caching, enable_kv_cache_events, dcp_world_size, pcp_world_size, scheduler_block_size, \
        hash_block_size, metrics_collector=None, num_prefill_lookahead=0, allow_partial_hash_hits=True)

v1.worker.cpu_worker
    overrides CPUWorker.__init__(self, vllm_config, *args, **kwargs)
    overrides CPUWorker.get_kv_cache_spec(self)
    overrides CPUWorker.initialize_from_config(self, kv_cache_config)
    overrides CPUWorker.execute_model(self, scheduler_output)
v1.worker.gpu_worker
    overrides Worker.__init__(self, vllm_config, *args, **kwargs)
    overrides Worker.get_kv_cache_spec(self)
    overrides Worker.initialize_from_config(self, kv_cache_config)
    overrides Worker.execute_model(self, scheduler_output)
v1.worker.worker_base
    stands under WorkerBase.set_kv_cache_layout(self, kv_cache_layout)
v1.core.sched.output
    reads SchedulerOutput.num_scheduled_tokens
    reads SchedulerOutput.scheduled_new_reqs
    reads SchedulerOutput.scheduled_cached_reqs
    reads SchedulerOutput.finished_req_ids
    reads SchedulerOutput.preempted_req_ids
    reads NewRequestData.req_id
    reads NewRequestData.prompt_len
    reads NewRequestData.num_computed_tokens
    reads NewRequestData.block_ids
    reads CachedRequestData.req_ids
    reads CachedRequestData.resumed_req_ids
    reads CachedRequestData.num_computed_tokens
    reads CachedRequestData.new_block_ids
v1.worker.gpu_model_runner
    reads GPUModelRunner.input_batch
    calls GPUModelRunner.get_model(self)
v1.worker.gpu_input_batch
    reads InputBatch.req_ids
v1.worker.gpu.model_runner
    calls GPUModelRunner.get_model(self)
    overrides GPUModelRunner.prepare_attn(self, input_batch)
v1.worker.gpu.input_batch
    reads InputBatch.req_ids
v1.worker.gpu.block_table
    stands under BlockTables.gather_block_tables(self, idx_mapping, num_reqs_padded, out=None, out_ptrs=None)
"""
"""By module: what the plugin does with a name there, and with which arguments. First settings, then attention and
layers, the scheduler's side, and the worker's (`v1.worker.gpu.*` is model runner V2, `gpu_model_runner` V1)."""


@dataclass(frozen=True)
class Hook:
    """One thing in vLLM that the plugin relies on.

    Attributes:
        module: without the leading `vllm.`.
        use: what the plugin does with it: it *overrides*, *calls* or *reads* it, or *stands under* what it never names
            but is called through.
        name: of a function or class, or of something in a class after a dot.
        arguments: None for what is not called; else as in a `def`: those of the plugin's own method if it overrides,
            those that it gives if it calls, and what 0.32.0 has if it stands under.
    """

    module: str
    use: str
    name: str
    arguments: str | None


def _hooks() -> Iterator[Hook]:
    backends = "".join(_BACKEND.format(module=module, name=name, impl=impl) for module, name, impl in _BACKENDS)
    module = ""
    for line in _TABLE.replace("{backends}", backends).splitlines():
        said = re.fullmatch(r" +(overrides|calls|reads|stands under) ([\w.]+)(?:\((.*)\))?", line)
        if said:
            use, name, arguments = said.groups()
            yield Hook(module, use, name, None if arguments is None else " ".join(arguments.split()))
        elif line:
            module = line


HOOKS = tuple(_hooks())


class HookFound(NamedTuple):
    """What was found of a hook.

    Attributes:
        holds: the plugin can use it as it is.
        says: `as expected`, or what differs.
    """

    holds: bool
    says: str


def look(hook: Hook, sources: Sources) -> HookFound:
    """Return whether a hook is there, and what differs."""
    found = sources.find(hook.module, hook.name)
    if found is None:
        homes = sources.moved(hook.module, hook.name)
        if not homes:
            return HookFound(False, "missing")
        _, parts = _compare(hook, sources.find(homes[0], hook.name))
        return HookFound(False, " and ".join([f"moved to {', '.join(homes)}", *parts]))
    holds, parts = _compare(hook, found)
    return HookFound(holds, "; ".join(parts) or "as expected")


def _compare(hook: Hook, found: ast.AST | None) -> tuple[bool, list[str]]:
    """Return whether the plugin can use what was found, and how it differs from what is expected."""
    if hook.arguments is None:
        return True, []
    if not isinstance(found, Function):
        return False, ["is no function"]
    expected, passes_on = _arguments(ast.parse(f"lambda {hook.arguments}: 0", mode="eval").body.args)  # type: ignore[attr-defined]
    real, takes_any = _arguments(found.args)
    common = [name for name in expected if name in real]
    swapped = common != [name for name in real if name in expected]
    lost = [name for name in expected if name not in real and not takes_any]
    more = [name for name in real if name not in expected]
    between = bool(more and common) and list(real).index(more[0]) < list(real).index(common[-1])
    if hook.use == "overrides":
        # vLLM calls the plugin: what it gives must be taken, what it gives no more may not be needed.
        more = more if between or not passes_on else []
        harmed = bool(more) or any(not expected[name] for name in lost)
    else:
        more = more if hook.use == "stands under" else [name for name in more if between or not real[name]]
        harmed = bool(lost or more)
    parts = [f"lost {', '.join(lost)}"] * bool(lost) + [f"gained {', '.join(more)}"] * bool(more)
    parts += ["changed the order of its arguments"] * swapped
    return not (harmed or swapped), parts


def _arguments(of: ast.arguments) -> tuple[dict[str, bool], bool]:
    """Return the arguments by name (whether they may be left out), and whether any others are taken."""
    places = [*of.posonlyargs, *of.args]
    needed = len(places) - len(of.defaults)
    named = {each.arg: i >= needed for i, each in enumerate(places)}
    named |= {each.arg: default is not None for each, default in zip(of.kwonlyargs, of.kw_defaults, strict=True)}
    return named, of.kwarg is not None


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
