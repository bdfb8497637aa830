"""vLLM's attention backends, which begin to read where a request's entries begin; resolved by name, as vLLM does it.

`kvpolicy.runtimes.vllm.backends.CPU_ATTN` and its like are what the plugin registers in the place of vLLM's own. They
are vLLM's own classes wherever no policy is set.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.vllm.layouts import TOKEN_BY_TOKEN, TRANSPOSED_KEYS
from kvpolicy.runtimes.vllm.session import Session, shifted, with_lengths

NAMES: Final = (*TRANSPOSED_KEYS, *TOKEN_BY_TOKEN)
"""Backends that are served, by their names in vLLM."""

_replaced: dict[str, str] = {}  # what a backend was before the plugin: vLLM's own class, or another plugin's


def register() -> None:
    """Put the served backends in the place of vLLM's own; doing it again changes nothing."""
    from vllm.v1.attention.backends import registry

    for name in NAMES:
        member = getattr(registry.AttentionBackendEnum, name, None)
        ours = f"{__name__}.{name}"
        if member is not None and member.get_path() != ours:
            _replaced[name] = member.get_path()
            registry.register_backend(member, ours)


def forget_choices() -> None:
    """Let vLLM choose backends anew: it remembers those of an engine that this process had before, without a policy."""
    from vllm.v1.attention import selector

    remembered = getattr(selector, "_cached_get_attn_backend", None)
    if remembered is not None:
        remembered.cache_clear()


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from kvpolicy.runtimes.vllm.engine import plan_of

    if name not in _replaced:
        register()
    base = resolve_obj_by_qualname(_replaced[name])
    config = get_current_vllm_config_or_none()
    return base if config is None or plan_of(config) is None else evicting(base)


@cache
def evicting(base: Any) -> Any:
    """Return a backend that does what another one does, under a policy."""

    class Evicting(base):
        """An attention backend whose requests are compacted."""

        @staticmethod
        def get_impl_cls() -> Any:
            return _impl(base.get_impl_cls())

        @staticmethod
        def get_builder_cls() -> Any:
            return _builder(base.get_builder_cls())

    Evicting.__name__ = Evicting.__qualname__ = f"Evicting{base.__name__}"
    return Evicting


@cache
def _impl(base: Any) -> Any:
    class Evicting(base):
        """An attention call whose queries the policy may look at."""

        kvpolicy: Session | None = None
        kvpolicy_layer = -1

        def forward(
            self, layer: Any, query: torch.Tensor, key: Any, value: Any, kv_cache: Any, attn_metadata: Any,
            *args: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            result = super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)
            if self.kvpolicy is not None and attn_metadata is not None:
                self.kvpolicy.record(self.kvpolicy_layer, query.view(-1, self.num_heads, self.head_size))
            return result

    Evicting.__name__ = Evicting.__qualname__ = f"Evicting{base.__name__}"
    return Evicting


@cache
def _builder(base: Any) -> Any:
    class Evicting(base):
        """A builder of attention metadata that leaves out what was evicted."""

        def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, *args, **kwargs)
            self._kvpolicy_layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]

        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            session = getattr(self._kvpolicy_layer.impl, "kvpolicy", None)
            if session is not None:
                common_attn_metadata = without_evicted(session, common_attn_metadata)
            return super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)

    Evicting.__name__ = Evicting.__qualname__ = f"Evicting{base.__name__}"
    return Evicting


def without_evicted(session: Session, told: Any) -> Any:
    """Return what a builder is told of a batch (CommonAttentionMetadata), without what was evicted.

    Raises:
        UnsupportedError: the batch is cut in a way that is not served.
    """
    reading = session.plan(told.block_table_tensor)
    if reading is None or not (reading.moved or any(reading.skipped)):
        return told  # nobody has been compacted
    packed = reading.packed
    if told.query_start_loc_cpu[: len(packed.starts)].tolist() != list(packed.starts):
        raise UnsupportedError(
            "vLLM has cut a step into parts, which kvpolicy does not know; leave micro-batching options out."
        )
    if reading.moved:
        # In place: vLLM has handed the same memory to the layers that store keys and values.
        slots = packed.block * session.cache.store.block + packed.offset
        told.slot_mapping[: packed.tokens] = slots.to(told.slot_mapping.dtype)
    changes: dict[str, Any] = {
        "block_table_tensor": shifted(told.block_table_tensor, reading.skipped),
        "seq_lens": with_lengths(told.seq_lens, reading.lengths),
        "max_seq_len": max(reading.lengths),
    }
    for name in ("seq_lens_cpu_upper_bound", "_seq_lens_cpu"):
        if getattr(told, name, None) is not None:
            changes[name] = with_lengths(getattr(told, name), reading.lengths)
    for name in ("_num_computed_tokens_cache", "_num_computed_tokens_cpu"):
        if getattr(told, name, None) is not None:
            changes[name] = None
    return told.replace(**changes)
