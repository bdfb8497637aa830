"""vLLM's scheduler side: a cache spec that says how little a request needs, and a manager that frees what is evicted.

Importing this module registers both with vLLM; it is imported where a worker makes the spec, and where the scheduler's
process unpickles it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvpolicy.cache.blocks import live_blocks
from kvpolicy.errors import CacheStateError
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.vllm.books import Books, needed
from kvpolicy.runtimes.vllm.settings import armed
from kvpolicy.spec import PolicySpec


@dataclass(frozen=True)
class EvictionPlan:
    """What scheduler and workers must both know, besides step sizes; it travels in the cache spec.

    Attributes:
        policy: as YAML, in full.
        longest: tokens of the longest request (`--max-model-len`).
        widest: most tokens of a step (`--max-num-batched-tokens`).
        prompt: see `ServingSettings.prompt`.
    """

    policy: str
    longest: int
    widest: int
    prompt: int | None = None

    def build(self) -> Policy:
        """Return the policy."""
        return PolicySpec.from_yaml(self.policy, "the engine's policy").build()

    def numbers(self) -> dict[str, Any]:
        """Return the rest, as `Books` takes it."""
        return {"longest": self.longest, "widest": self.widest, "prompt": self.prompt}


@dataclass(frozen=True, kw_only=True)
class EvictingSpec(FullAttentionSpec):
    """A layer of full attention whose requests are compacted.

    Never a subclass of SlidingWindowSpec: runners mask the layers of those.
    """

    plan: EvictionPlan | None = None

    @staticmethod
    def of(spec: FullAttentionSpec, plan: EvictionPlan) -> EvictingSpec:
        """Make one of the spec that vLLM made for the layer."""
        return EvictingSpec(**{each.name: getattr(spec, each.name) for each in fields(spec)}, plan=plan)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Return the bytes of the smallest pool that serves every request: what is kept and one more step."""
        full: int = super().max_memory_usage_bytes(vllm_config)
        assert self.plan is not None
        least = needed(self.plan.build(), self.plan.longest, self.plan.widest)
        if least is None:
            return full
        smallest: int = (-(-least // self.block_size) + 1) * self.page_size_bytes
        return min(full, smallest)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Return the one spec of a group of layers."""
        merged: Self = replace(super().merge(specs), plan=specs[0].plan)
        return merged


class EvictingManager(FullAttentionManager):
    """Frees the blocks that a compaction gives back, and lets a request in when it will never have to be given up.

    The worker compacts a request at the start of the step before whose tokens it is due. That step is being scheduled
    here, so that the blocks may go to other requests in the very same step.
    """

    def __init__(self, kv_cache_spec: EvictingSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        plan = kv_cache_spec.plan
        assert plan is not None
        self._blocks = self.block_pool.num_gpu_blocks - 1  # without the null block
        self.books = Books(plan.build(), block=self.block_size, blocks=self._blocks, **plan.numbers())
        self._prompts: dict[str, int] = {}  # of requests that wait to be let in
        self._armed = armed()

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Learn how long a request's prompt is; nothing is freed here: no block is read by a step in flight later."""
        if request_id not in self.books and num_prompt_tokens is not None:
            self._prompts[request_id] = num_prompt_tokens

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Return how many blocks must be free for a request's next tokens; a compaction that is due frees some now.

        For a request that wants to be let in it is what it may ever come to hold, and what is promised to others.
        """
        if request_id not in self.books:
            return self.books.wanted(self._prompts.get(request_id, num_tokens), num_tokens)
        first = self.books.compact(request_id, num_tokens)
        if first:
            self._remove_blocks_in_range(request_id, 0, first)
        more: int = -(-num_tokens // self.block_size) - len(self.req_to_blocks[request_id])
        return max(more, 0)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[Any]:
        """Give a request the blocks for its next tokens, and count these."""
        if request_id not in self.books:
            self.books.enter(request_id, self._prompts.pop(request_id, num_tokens), num_tokens)
        blocks: list[Any] = super().allocate_new_blocks(request_id, num_tokens, *args, **kwargs)
        self.books.advance(request_id, num_tokens)
        if self._armed:
            self._check()
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """Forget a request that has finished or is given up."""
        self.books.drop(request_id)
        self._prompts.pop(request_id, None)
        blocks: Sequence[Any] = super().pop_blocks_for_free(request_id)
        return [block for block in blocks if not block.is_null]

    def _check(self) -> None:
        """Raise CacheStateError unless every request owns the blocks that its counters say, and nobody else does."""
        owned: set[int] = set()
        for row, blocks in self.req_to_blocks.items():
            counts = self.books.ledger.rows[row]
            first = live_blocks(counts.seen, counts.resident, self.block_size).start
            live = {block.block_id for block in blocks[first:] if not block.is_null}
            whole = all(block.is_null for block in blocks[:first]) and len(live) == len(blocks) - first
            if not whole or len(live) < self.books.held[row] or owned & live:
                raise CacheStateError(
                    f"scheduler: request {row!r} holds {counts.resident} of {counts.seen} tokens, but its blocks "
                    f"{[block.block_id for block in blocks]} are not those; this is a fault of kvpolicy."
                )
            owned |= live
        free = self.block_pool.get_num_free_blocks()
        if len(owned) + free != self._blocks:
            raise CacheStateError(
                f"scheduler: of {self._blocks} blocks {len(owned)} are held and {free} free; this is a fault of "
                "kvpolicy."
            )


def _register() -> None:
    registry: Any = KVCacheSpecRegistry
    # Until vLLM's own specs are registered, one of another's would keep them from being.
    if hasattr(registry, "_ensure_registered"):
        registry._ensure_registered()
    registry.register(EvictingSpec, EvictingManager, uniform_type_base_spec=FullAttentionSpec)


_register()
