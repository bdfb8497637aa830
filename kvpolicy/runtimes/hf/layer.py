"""One evictable layer of a `PolicyCache`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from kvpolicy import ops
from kvpolicy.cache.entering import NEED, enter
from kvpolicy.cache.picture import LayerFacts
from kvpolicy.cache.store import Base
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf.attention import packed_attention, packs
from kvpolicy.runtimes.hf.handover import AttentionFunction, mark
from kvpolicy.runtimes.hf.hidden import hidden_states
from kvpolicy.runtimes.hf.implementations import attend, check_served, last
from kvpolicy.runtimes.hf.passes import Passes, ordinary_tensors
from kvpolicy.runtimes.hf.projection import output_projection
from kvpolicy.runtimes.hf.sharing import SharedFacts, joined_facts, joined_queries, reader


class EvictingLayer(CacheLayerMixin):
    """Hands keys and values to the engine and takes part in the attention of its layer.

    transformers calls `update` before the attention and the registered wrapper calls `attend` instead of it.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, passes: Passes, layer_idx: int, readers: tuple[int, ...] = ()) -> None:
        self.passes = passes
        self.layer_idx = layer_idx
        self.readers = readers or (layer_idx,)  # whose attention reads these keys, this layer's own first

    @property
    def is_initialized(self) -> bool:
        """Whether keys have been stored."""
        return self.layer_idx in self.passes.engine.stores

    def _resident(self, name: str) -> Tensor | None:
        engine = self.passes.engine
        store = engine.stores.get(self.layer_idx)
        if store is None:
            return None
        slots = store.read(self.layer_idx, engine.held(slice(None)))
        tensor: Tensor = getattr(slots, name)
        return tensor

    @property
    def keys(self) -> Tensor | None:
        """Resident keys `[B, H, N, D]`; shorter rows, and heads that hold less, have unused slots."""
        return self._resident("keys")

    @property
    def values(self) -> Tensor | None:
        """Resident values `[B, H, N, Dv]`."""
        return self._resident("values")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        raise UnsupportedError(
            "a layer of a PolicyCache cannot be copied or pickled by itself; fork() the cache that it belongs to."
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the engine allocates when the first keys arrive."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys `[B, H, q, D]` and values; return views over everything that is resident."""
        if key_states.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError("PolicyCache is for inference: call the model under torch.no_grad().")
        current = self.passes.arrive(key_states)
        engine = self.passes.engine
        if self.layer_idx in engine.stores:
            keys, values = engine.append(self.layer_idx, key_states, value_states)
        else:
            with ordinary_tensors():
                keys, values = engine.append(self.layer_idx, key_states, value_states)
        current.unattended = self.layer_idx
        mark(keys, self)
        return keys, values

    def attend(
        self,
        function: AttentionFunction,
        base: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Run the model's own attention function over the resident entries, and keep what the policy needs of it.

        Every layer comes by here once per token, so that its steps stand in one function: calls are what it costs.
        """
        current, engine = self.passes.current, self.passes.engine
        forward = engine.forward
        if current is None or forward is None:
            raise CacheStateError("attention was called outside of a forward pass of this cache.")
        current.unattended, current.attending = None, self.layer_idx
        if module not in self.passes.modules:
            self.passes.check_module(module)
        who = reader(module, self.layer_idx)
        facts: LayerFacts | None = engine.facts.get(self.layer_idx)
        if isinstance(facts, SharedFacts):
            facts = facts.parts.get(who)
        if facts is None:
            facts = self._learn(base, module, query, value, kwargs)
        if mask is not None and mask.shape[-1] != key.shape[2]:
            raise UnsupportedError(
                "this model asks for a mask that is not simply causal, after padding or an eviction; "
                "give such input (images, for example) in the first, unpadded forward pass."
            )
        base_entries = engine.ragged_base(self.layer_idx) if engine.stores.ragged else None
        output: tuple[Tensor, Tensor | None]
        if base_entries is not None:
            _check_ragged(module, kwargs)
            output = self._attend_ragged(base_entries, query, key, value, mask, facts), None
        else:
            turned = engine.turn_queries(self.layer_idx, query)
            if mask is None and forward.columns == 1 and forward.visible is None and packs(function, query, kwargs):
                output = packed_attention(turned, key, value, facts.scale), None
            else:
                output = attend(function, base, module, turned, key, value, mask, forward, kwargs)
        if who == self.layer_idx and NEED in engine.policy.needs:
            enter(engine, who, hidden_states(module, forward.columns))
        if self.readers == (who,):
            engine.record(self.layer_idx, query, facts)
        else:
            self._record(who, module, query, facts, key.shape[1])
        current.attending = None
        return output

    def _learn(self, base: str, module: nn.Module, query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> LayerFacts:
        """Return what the first attention call of a reader says of all that follow; raises UnsupportedError."""
        if kwargs.get("position_bias") is not None:
            raise UnsupportedError("models with a position bias are not supported; use one with rotary embeddings.")
        check_served(base, query, kwargs)
        if self.passes.engine.stores.ragged:
            _check_ragged(module, kwargs)
        return self._facts(module, query, value, kwargs)

    def _record(self, who: int, module: nn.Module, query: Tensor, facts: LayerFacts, heads: int) -> None:
        """Keep what the policy needs of an attention call, once the last of several readers of these keys came by."""
        engine, current = self.passes.engine, self.passes.current
        assert current is not None
        if who not in self.readers:
            raise UnsupportedError(
                f"layer {who} ({type(module).__name__}) reads the keys of layer {self.layer_idx} without saying so; "
                "use a model whose layers keep keys of their own."
            )
        calls = current.readings.setdefault(self.layer_idx, {})
        calls[who] = query, facts
        if not set(self.readers) <= set(calls):
            return
        del current.readings[self.layer_idx]
        known = engine.facts.get(self.layer_idx)
        if not isinstance(known, SharedFacts):
            known = joined_facts({i: calls[i][1] for i in self.readers}, self.layer_idx)
        queries = joined_queries([calls[i][0] for i in self.readers], heads) if engine.log.active else query
        engine.record(self.layer_idx, queries, known)

    def _attend_ragged(
        self, base: Base, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, facts: LayerFacts
    ) -> Tensor:
        """Attend to a ragged base and its tail, which no attention function of a model knows; `[B, q, Hq, Dv]`."""
        engine, forward = self.passes.engine, self.passes.engine.forward
        assert forward is not None
        if mask is not None:
            raise UnsupportedError("this model asks for a mask that is not simply causal after a head-wise eviction.")
        masked = forward.columns > 1 or forward.visible is not None
        with ops.using_backend(engine.policy.backend):
            output = ops.ragged_attention(
                engine.turn_queries(self.layer_idx, query), base.blocks, key, value,
                last(forward.mask_on(key.device, explicit=True), query) if masked else None,
                scale=facts.scale, softcap=facts.softcap, attention_sinks=facts.attention_sinks,
            )  # fmt: skip
        return output.transpose(1, 2).contiguous()

    def _facts(self, module: nn.Module, query: Tensor, value: Tensor, kwargs: dict[str, Any]) -> LayerFacts:
        scale = kwargs.get("scaling")
        sinks = kwargs.get("s_aux")
        heads = value.shape[1]
        groups = query.shape[1] // heads
        asked = "weights" in self.passes.engine.policy.needs
        return LayerFacts(
            groups=groups,
            scale=float(scale) if scale is not None else query.shape[-1] ** -0.5,
            softcap=kwargs.get("softcap"),
            attention_sinks=None if sinks is None else sinks.detach().reshape(heads, -1),
            output_projection=output_projection(module, heads, groups, value) if asked else None,
        )

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return (columns after this pass, 0); transformers 5.2 passes the cache positions instead of a length."""
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.passes.engine.columns + length, 0

    def get_seq_length(self) -> int:
        """Return the tokens seen, padding included: what transformers calls the length of a cache."""
        return self.passes.engine.columns

    def get_max_length(self) -> int:
        """Return -1: any number of tokens may pass through."""
        return -1

    get_max_cache_shape = get_max_length  # the name in transformers 5.2

    def reset(self) -> None:
        """Do nothing, here and below: the cache acts on the engine, once for all layers."""

    def crop(self, tokens_to_remove: int) -> None:
        """See `reset`."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See `reset`."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See `reset`."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `reset`."""


def _check_ragged(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse what attention over heads that hold different numbers of entries does not compute."""
    if kwargs.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        raise UnsupportedError(
            "output_attentions: under a policy that gives heads different numbers of entries there is no matrix of "
            "weights to return; leave it out, or choose a policy that keeps the same number for every head."
        )
    if kwargs.get("dropout"):
        raise UnsupportedError(
            f"{type(module).__name__} drops attention weights at random in training mode, which attention over heads "
            "with different numbers of entries does not; call model.eval() first."
        )


def crop_others(layers: Sequence[Any], tokens: int, columns: int) -> None:
    """Take tokens back from the layers of a cache that are not ours; see `PolicyCache.crop`.

    Args:
        layers: all layers of the cache.
        tokens: as `crop` was called with.
        columns: how many tokens that is.
    """
    for i, layer in enumerate(layers):
        if isinstance(layer, EvictingLayer):
            continue
        try:
            layer.crop(tokens)
        except (ValueError, RuntimeError) as error:
            raise CacheStateError(
                f"crop: layer {i}, a {type(layer).__name__}, keeps no more than its window or state and cannot take "
                f"back {columns} tokens; fork() the cache before tokens that may have to be taken back."
            ) from error


def has_other_layers(cache: Cache) -> bool:
    """Whether some layers of a cache are not ours: a window of columns, or a linear state.

    To these, padding inside a row is a gap in time, so that the row is not what it is alone.
    """
    return not all(isinstance(layer, EvictingLayer) for layer in cache.layers)
