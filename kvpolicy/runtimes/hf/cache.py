"""`PolicyCache`: a transformers cache that forgets what its policy says."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvpolicy.cache.engine import Engine
from kvpolicy.cache.entering import NEED
from kvpolicy.cache.graph import GraphEngine
from kvpolicy.cache.ledger import Kind
from kvpolicy.contracts.components import NEEDS
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf.attach import attach
from kvpolicy.runtimes.hf.attention import attention_modules
from kvpolicy.runtimes.hf.feeding import FedCache
from kvpolicy.runtimes.hf.given import Amount, check_model, resolve
from kvpolicy.runtimes.hf.graph import GraphLayer, GraphPasses
from kvpolicy.runtimes.hf.handover import announce
from kvpolicy.runtimes.hf.hidden import leave_hidden_states
from kvpolicy.runtimes.hf.layer import EvictingLayer, crop_others
from kvpolicy.runtimes.hf.model_facts import head_shapes, hidden_size, image_tokens
from kvpolicy.runtimes.hf.parallel import parallel_heads
from kvpolicy.runtimes.hf.passes import KINDS, Passes
from kvpolicy.runtimes.hf.rope import layer_ropes
from kvpolicy.runtimes.hf.sharing import compute_whole_prompts, readers
from kvpolicy.runtimes.hf.showing import ShownCache
from kvpolicy.runtimes.hf.stats import CacheStats, collect, positions_of
from kvpolicy.runtimes.hf.steps import open_before_forward, refuse_in_a_graph, slots_of
from kvpolicy.runtimes.hf.trial import alike, refuse_implementation, survey, try_attention
from kvpolicy.tables import check_fit

if TYPE_CHECKING:
    from kvpolicy.spec import PolicySpec

SERVED = frozenset({"queries", "attention", "query_stream", "query_statistics", "rope", "weights", "modality", NEED})
"""The needs of components that this runtime can serve."""


class PolicyCache(ShownCache, FedCache, Cache):
    """A cache for ``model.generate(..., past_key_values=cache)`` that follows a policy; from 5.24 on, ``cache=cache``.

    Making one attaches it to the model; leaving its ``with`` block, `close()`, or its collection detaches it. Other
    caches on the same model are not affected at any time.

    Args:
        policy: a `Policy`, a `PolicySpec`, the name of a registered policy, or the path of a policy file.
        model: a decoder of transformers whose attention goes through the attention registry.
        budget: takes the place of the policy's own, as in `kvpolicy.load`.
        graph: whether decode steps are to run as one graph (`torch.compile`, CUDA graphs): every layer then has as many
            slots as the policy bounds its entries to, or this number of them, and they stay where they are.

    Raises:
        UnsupportedError: the model, its attention implementation, a need of the policy or `graph` is not supported.
        SpecError: the policy, its budget, or the number of slots is not valid.
        TableError: a calibration table of the policy is not of a model of this shape.
    """

    def __init__(
        self,
        policy: Policy | PolicySpec | str | Path,
        model: PreTrainedModel,
        *,
        budget: Amount | None = None,
        graph: bool | int = False,
    ) -> None:
        check_model(model, "PolicyCache(policy, model)")
        self.policy = resolve(policy, budget)
        missing = sorted(self.policy.needs - SERVED)
        if missing:
            raise UnsupportedError(
                f"policy {self.policy.name!r} needs {missing[0]} ({NEEDS.get(missing[0], 'not known')}), which the "
                "transformers runtime cannot give; choose another component."
            )
        parts: Any = {} if graph is False else {"slots": slots_of(self.policy, graph)}
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedError(f"{type(model).__name__} is an encoder-decoder model; only decoders are supported.")
        generation = getattr(model, "generation_config", None)  # a model without a language head has none
        refuse_implementation(getattr(generation, "cache_implementation", None), "generation_config")
        layers, modules = survey(model)
        evictable = list(modules)
        try_attention(model, modules)
        for shape in dict.fromkeys(head_shapes(model, evictable)):
            check_fit(self.policy.components, len(layers), *shape, hidden_size(model))
        ropes = layer_ropes(model, evictable) if self.policy.needs & {"rope", "query_statistics"} else {}
        ranks, heads = parallel_heads(model, evictable)
        every = attention_modules(model)
        shared = readers(model, every)
        kinds: Any = (Engine, Passes, EvictingLayer)
        if graph is not False:
            refuse_in_a_graph(model, self.policy, layers, evictable, shared)
            kinds = (GraphEngine, GraphPasses, GraphLayer)
        engine = kinds[0](self.policy, alike(modules), len(layers), ropes, ranks=ranks, heads=heads, **parts)
        self._passes: Passes = kinds[1](engine, model, every, has_images=bool(image_tokens(model)))
        for i in evictable:
            layers[i] = kinds[2](self._passes, i, shared.get(i, ()))
        self.model, self._graph = model, graph
        super().__init__(layers=layers)
        undo = [attach(model, modules)]
        if NEED in self.policy.needs:
            undo.append(leave_hidden_states(modules.values()))
        if isinstance(self._passes, GraphPasses):
            self._passes.layers = {i: layers[i] for i in evictable}
            undo.append(open_before_forward(model))
        if shared:
            undo.append(compute_whole_prompts(model))
        self._detach = weakref.finalize(self, _call_all, undo)

    # -- life ---------------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine behind this cache."""
        return self._passes.engine

    @property
    def looks_at_queries(self) -> bool:
        """Whether the policy looks at queries, so that every layer has to compute those of every token."""
        return self.engine.log.active

    def __enter__(self) -> Self:
        if not self._detach.alive:
            raise CacheStateError("this cache is closed; make a new PolicyCache.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is None:
            self._passes.check(at_exit=True)

    def close(self) -> None:
        """Detach from the model, which behaves as before from now on; what was kept can still be read."""
        self._detach()

    def reset(self) -> None:
        """Forget everything and start over, with the same policy and model."""
        self.engine.reset()
        self._passes.reset()
        # New ones for the layers that are not ours: in transformers 5.2 their reset() only zeroes them.
        for i, layer in enumerate(DynamicCache(config=self.model.config).layers):
            if not isinstance(self.layers[i], EvictingLayer):
                self.layers[i] = layer

    def fork(self) -> PolicyCache:
        """Return an independent copy that is attached to the same model, for several continuations of one prompt."""
        if not self._detach.alive:
            raise CacheStateError("this cache is closed; fork() it before its `with` block ends.")
        twin = PolicyCache(self.policy, self.model, graph=self._graph)
        twin._passes.fork(self._passes)
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, EvictingLayer):
                twin.layers[i] = copy.deepcopy(layer)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> PolicyCache:
        """Return a `fork`: an independent cache on the same model, which is not copied."""
        return self.fork()

    def __copy__(self) -> PolicyCache:
        raise UnsupportedError("a shallow copy of a PolicyCache would share what it holds; fork() the cache instead.")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        raise UnsupportedError(
            "a PolicyCache belongs to its model in this process and cannot be pickled or saved; keep the text and feed "
            "it to a new cache, or fork() the cache to go on from it several times."
        )

    # -- what transformers calls --------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one layer's keys `[B, H, q, D]` and values; return what its attention works on."""
        result: tuple[Tensor, Tensor] = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        return result

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int) -> tuple[int, int]:
        """Return (key length, offset) for the mask of a layer; ours announces the mask that comes next."""
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        ours = isinstance(self.layers[layer_idx], EvictingLayer) and self._attached
        announce(self._passes if ours else None)
        return sizes

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return -1, as `get_max_length` does in newer transformers: any number of tokens may pass through."""
        return -1

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: any number of tokens may pass through."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """Whether the cache was made with `graph`, so that `generate` compiles decode steps where it does so."""
        return self._graph is not False and self._attached

    @property
    def _attached(self) -> bool:
        # A finalizer is more than can be traced, and a graph runs in a step that an attached cache has opened.
        return (self._graph is not False and torch.compiler.is_compiling()) or self._detach.alive

    @property
    def opens_steps(self) -> GraphPasses | None:
        """What opens a step before the model's `forward`; None unless the cache was made with `graph`."""
        return self._passes if isinstance(self._passes, GraphPasses) and self._detach.alive else None

    def activate_past_recording(self) -> None:
        """Prepare for crops, as assisted decoding asks before it starts (transformers 5.23).

        Raises:
            UnsupportedError: something has been seen, and would be fed again.
        """
        # On Apple's GPUs generate() asks the same after every prefill, for a rollback of its own.
        if self.engine.columns and self.model.device.type != "mps":
            raise UnsupportedError(
                f"assisted decoding passes the whole text again although the cache has seen {self.engine.columns} "
                "tokens of it; use it with a new cache and without chunks of the prompt."
            )
        super().activate_past_recording()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the rows, as beam search asks."""
        self._take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices` (int64 `[B']`, or bool `[B]`)."""
        if indices.dtype == torch.bool and self.engine.rows and indices.shape != (len(self.engine.rows),):
            raise CacheStateError(
                f"batch_select_indices: a mask of shape {list(indices.shape)} does not fit the "
                f"{len(self.engine.rows)} rows of the cache; give one boolean per row."
            )
        index = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._take_rows(index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place of itself."""
        if repeats < 1:
            raise CacheStateError(f"batch_repeat_interleave: {repeats} makes no sense; repeat rows at least once.")
        self._take_rows(torch.arange(len(self.engine.rows)).repeat_interleave(repeats))

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens; possible back to the last compaction.

        Args:
            tokens: 0 does nothing; a negative number is how many tokens to forget (transformers 5.23); a positive one
                is the length to cut back to (transformers 5.2). Tokens that come several at once after something was
                forgotten are a verification of candidates, not a new turn; `expect` says otherwise.

        Raises:
            CacheStateError: the cut lies before the last compaction, or a layer that keeps a window cannot go back.
        """
        columns = max(self.engine.columns - tokens, 0) if tokens > 0 else -tokens
        if not columns:
            # Layers that record the past, as assisted decoding asks them to, drop what they need no longer.
            for layer in self.layers:
                if getattr(layer, "record_past", False):
                    layer.crop(0)
            return
        self.engine.check_crop(columns)
        crop_others(self.layers, tokens, columns)
        self._passes.crop(columns)

    def _take_rows(self, index: Tensor) -> None:
        self._passes.take_rows(index)
        for layer in self.layers:
            if not isinstance(layer, EvictingLayer):
                # The one of the three that layers with a linear state have, and that moves all that a layer holds.
                layer.reorder_cache(index)

    # -- what people call ---------------------------------------------------------------------------------------------

    def expect(self, kind: Kind) -> None:
        """Say what the tokens of the next forward pass are, where the cache cannot know.

        Without it the first tokens, and several at once, are a prompt; one token is a decode step; several after a
        `crop`, and those that transformers' assisted decoding checks, are a verification.

        Args:
            kind: "prompt", "decode", or "verify" for candidates that may be taken back.
        """
        if kind not in KINDS:
            raise CacheStateError(f"expect: {kind!r} is no kind of forward pass; write one of {', '.join(KINDS)}.")
        self._passes.expected = kind

    def begin_step(self, attention_mask: Tensor | None = None) -> None:
        """Begin a decode step of a cache with `graph`, where the model's own `forward` is not what is called next.

        Calling the model, compiled or not, does it by itself. Before the replay of a captured CUDA graph, or a compiled
        part of the model, it is called once for each token: it compacts what is due and says where the token goes.
        `end_step` comes behind a replay, which runs no Python that could notice.

        Args:
            attention_mask: `[B, columns]`, of everything seen and the step's tokens; None where nothing is hidden.

        Raises:
            CacheStateError: there is no such step, as nothing has been cached or a row sits it out, or the one before
                has not run.
        """
        passes = self.opens_steps
        if passes is None or not passes.begin_by_hand(attention_mask):
            raise CacheStateError(
                "begin_step: there is no step to begin; make the cache with graph=True, feed the prompt first, and "
                "run a step in which a row is padding with the model as it is."
            )

    def end_step(self) -> None:
        """Say that a captured graph was replayed for the step that was begun; raises CacheStateError if none was."""
        if self.opens_steps is None or not self.opens_steps.end_by_hand():
            raise CacheStateError("end_step: no step is open; begin_step() comes before a replay, and this behind it.")

    def set_modality(self, images: Tensor) -> None:
        """Say which tokens of the prompt are image tokens, for policies that treat them apart.

        `kvpolicy.runtimes.hf.generate` does so by itself, by the image and video tokens of the model's configuration.

        Args:
            images: bool `[B, P]`, columns as in ``input_ids``, padding included; later tokens are text.
        """
        if not isinstance(images, Tensor) or images.dim() != 2 or images.dtype != torch.bool:
            got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
            raise CacheStateError(
                f"set_modality: a mask of {got} says nothing; give booleans "
                "[batch, prompt tokens], True for image tokens."
            )
        self.engine.modality = images.to("cpu")

    def check(self) -> None:
        """Make sure that the last forward pass was seen as a whole; leaving the `with` block, and reading, do it too.

        Raises:
            UnsupportedError: the model's attention went another way.
            CacheStateError: the model did not use the cache, the pass was interrupted, or its mask hid an old token.
        """
        self._passes.check()

    def stats(self) -> CacheStats:
        """Return seen, resident, evicted and peak entries, bytes and compactions, per layer and in total."""
        self._passes.settle()
        return collect(self.engine)

    def kept(self, layer: int, head: int, row: int = 0) -> list[int]:
        """Return the original positions that a KV head of a layer holds, ascending; positions do not count padding.

        Raises:
            CacheStateError: that layer is not one the policy works on, it has no such head, there is no such row, or
                nothing has been cached.
        """
        self._passes.settle()
        return positions_of(self.engine, layer, head, row)


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()
