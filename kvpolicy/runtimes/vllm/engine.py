"""What is read of vLLM's configuration and of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kvpolicy.cache.paged import PagedCache
from kvpolicy.cache.picture import LayerFacts
from kvpolicy.cache.ranks import ProcessGroup
from kvpolicy.cache.store import Layout
from kvpolicy.cache.store.paged import PagedStore
from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.contracts.ranks import ALONE
from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.vllm import refusals
from kvpolicy.runtimes.vllm.books import prompt_room, spared
from kvpolicy.runtimes.vllm.layouts import pages, probe
from kvpolicy.runtimes.vllm.rotary import rope_of
from kvpolicy.runtimes.vllm.settings import asked, settings
from kvpolicy.tables import check_fit

if TYPE_CHECKING:
    from kvpolicy.runtimes.vllm.spec import EvictingSpec, EvictionPlan


def plan_of(config: Any) -> EvictionPlan | None:
    """Return what an engine is to do, or None where no policy is set.

    Args:
        config: vLLM's VllmConfig.

    Raises:
        SpecError: the settings are not valid.
        UnsupportedError: the policy or the engine's options cannot be served, or the worker class is not kvpolicy's.
    """
    said = asked(config.additional_config)
    if said is None:
        return None
    import vllm

    from kvpolicy.runtimes.vllm.spec import EvictionPlan

    chosen = settings(said)  # read anew for each engine: a file may have changed since the last one
    policy = chosen.spec.build()
    untried = refusals.version_refusal(vllm.__version__)
    if untried and chosen.any_version:
        untried = refusals.hooks_refusal(vllm.__version__, Path(vllm.__file__).parent)
    refusals.refuse(untried)
    refusals.refuse(refusals.start_refusal(policy))
    refusals.refuse(refusals.engine_refusal(policy, config))
    worker = str(config.parallel_config.worker_cls)
    if worker != f"{__package__}.Worker":
        raise UnsupportedError(
            f"kvpolicy in vLLM: the worker class is {worker}, which does nothing for policy {policy.name!r}; start "
            f"vLLM with --worker-cls {__package__}.Worker."
        )
    longest, widest = config.model_config.max_model_len, config.scheduler_config.max_num_batched_tokens
    return EvictionPlan(chosen.spec.to_yaml(), longest, widest, chosen.prompt)


def evicting_spec(spec: Any, plan: EvictionPlan) -> Any:
    """Return the cache spec of a layer under the engine's policy, made of vLLM's own.

    Raises:
        UnsupportedError: the layer's attention cannot be compacted, or blocks do not fit the policy.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from kvpolicy.runtimes.vllm.spec import EvictingSpec

    windowed = any(getattr(spec, name, None) for name in ("sliding_window", "attention_chunk_size", "non_causal"))
    if type(spec) is not FullAttentionSpec or windowed:
        raise hybrid(type(spec).__name__)
    refusals.refuse(refusals.block_refusal(plan.build(), spec.block_size))
    return EvictingSpec.of(spec, plan)


def hybrid(kind: str) -> UnsupportedError:
    """Return the refusal of a model with layers of another kind."""
    return UnsupportedError(
        f"kvpolicy in vLLM: a layer has a cache of its own kind ({kind}), and all layers of a model share one block "
        "table here; choose a model in which every layer attends to everything before it."
    )


# -- what a worker opens ----------------------------------------------------------------------------------------------


def open_cache(config: Any, spec: EvictingSpec, model: nn.Module, layers: Mapping[int, Any], blocks: int) -> PagedCache:
    """Return the paged cache over the pages that vLLM has allocated.

    Args:
        config: vLLM's VllmConfig.
        spec: of all layers.
        model: vLLM's.
        layers: vLLM's attention layers here, by index.
        blocks: of the pool.

    Raises:
        UnsupportedError: a layer, its backend or the split over ranks cannot be served.
    """
    from vllm.distributed.parallel_state import get_tp_group

    assert spec.plan is not None
    policy, group = spec.plan.build(), get_tp_group()
    total = config.model_config.get_total_num_kv_heads()
    if total % group.world_size:
        raise UnsupportedError(
            f"kvpolicy in vLLM: {total} KV heads cannot be split over {group.world_size} ranks, which would hold "
            f"copies of them; choose a --tensor-parallel-size that divides {total}."
        )
    heads = HeadSpan(group.rank_in_group * spec.num_kv_heads, spec.num_kv_heads, total)
    number = config.model_config.get_total_num_hidden_layers()
    check_fit(policy.components, number, total, spec.head_size)
    keys, values = {}, {}
    for i, layer in layers.items():
        keys[i], values[i] = _pages(layer, spec)
    device = next(iter(keys.values())).device
    layout = Layout(tuple(layers), heads.here, spec.head_size, spec.head_size_v, spec.dtype, device, policy.slot_states)
    numbers = spec.plan.numbers()
    room = prompt_room(policy, block=spec.block_size, blocks=blocks - 1, **numbers)
    turning = bool(policy.needs & {"rope", "query_statistics"})
    return PagedCache(
        policy,
        PagedStore(layout, keys, values, whole_blocks=True),
        number,
        {i: rope_of(model, layer, device) for i, layer in layers.items()} if turning else {},
        ranks=ProcessGroup(group.device_group) if group.world_size > 1 else ALONE,
        heads=heads if group.world_size > 1 else None,
        prompt_room=room,
        spared=spared(policy),
    )


def facts_of(layer: Any) -> LayerFacts:
    """Return what one of vLLM's attention layers says of its attention."""
    impl = layer.impl
    softcap = getattr(impl, "logits_soft_cap", None) or None
    sinks = getattr(impl, "sinks", None)
    groups = impl.num_heads // impl.num_kv_heads
    shaped = None if sinks is None else sinks.float().view(impl.num_kv_heads, groups)
    return LayerFacts(groups, float(impl.scale), softcap, shaped)


def _pages(layer: Any, spec: EvictingSpec) -> tuple[Tensor, Tensor]:
    """Return a layer's keys and values as views, tried out with the backend's own way of storing."""
    impl, cache = layer.impl, layer.kv_cache
    name = layer.attn_backend.get_name()
    for attribute, what in (("alibi_slopes", "ALiBi, which counts distances in slots"),
                            ("kv_sharing_target_layer_name", "keys and values of another layer")):  # fmt: skip
        if getattr(impl, attribute, None) is not None:
            raise UnsupportedError(f"{layer.layer_name} uses {what}, which is not served; choose another model.")
    keys, values = pages(name, cache, spec.num_kv_heads, spec.head_size, spec.head_size_v)
    if keys.shape[1] != spec.block_size:
        raise UnsupportedError(
            f"{name} cuts blocks of {spec.block_size} into blocks of {keys.shape[1]}; start vLLM with "
            f"--block-size {keys.shape[1]}."
        )
    probe(name, keys, values, lambda k, v, slots: impl.do_kv_cache_update(layer, k, v, cache, slots))
    return keys, values
