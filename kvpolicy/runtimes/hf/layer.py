"""One evictable layer of a `PolicyCache`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from kvpolicy.engine import LayerFacts
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf.attention import AttentionFunction, additive, mark

if TYPE_CHECKING:
    from kvpolicy.runtimes.hf.cache import Session


class EvictingLayer(CacheLayerMixin):
    """Hands keys and values to the engine and takes part in the attention of its layer.

    transformers calls `update` before the attention and the registered wrapper calls `attend` instead of it.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, session: Session, layer_idx: int) -> None:
        self.session = session
        self.layer_idx = layer_idx

    @property
    def is_initialized(self) -> bool:
        """Whether keys have been stored."""
        return self.layer_idx in self.session.engine.stores

    def _resident(self, arena: str) -> Tensor | None:
        engine = self.session.engine
        store = engine.stores.get(self.layer_idx)
        if store is None:
            return None
        end = max((row.resident for row in engine.rows), default=0)
        tensor: Tensor = getattr(store, arena)[store.index[self.layer_idx]][:, :, :end]
        return tensor

    @property
    def keys(self) -> Tensor | None:
        """Resident keys `[B, H, N, D]`; shorter rows have unused slots at their end."""
        return self._resident("keys")

    @property
    def values(self) -> Tensor | None:
        """Resident values `[B, H, N, Dv]`."""
        return self._resident("values")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the engine allocates when the first keys arrive."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys `[B, H, q, D]` and values; return views over everything that is resident."""
        if key_states.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError("PolicyCache is for inference: call the model under torch.no_grad().")
        session = self.session
        if session.announced is not None or session.unattended is not None:
            session.begin(key_states)
        keys, values = session.engine.append(self.layer_idx, key_states, value_states)
        session.unattended = self.layer_idx
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
        """Run the model's own attention function over the resident entries, and keep what the policy needs of it."""
        engine, forward = self.session.engine, self.session.engine.forward
        if forward is None:
            raise CacheStateError("attention was called outside of a forward pass of this cache.")
        if kwargs.get("position_bias") is not None:
            raise UnsupportedError("models with a position bias are not supported; use one with rotary embeddings.")
        facts = engine.facts.get(self.layer_idx) or self._facts(module, query, key, kwargs)
        if mask is not None and mask.shape[-1] != key.shape[2]:
            raise UnsupportedError(
                "this model asks for a mask that is not simply causal, after padding or an eviction; "
                "give such input (images, for example) in the first, unpadded forward pass."
            )
        if mask is None:
            allowed = forward.mask_on(key.device, explicit=base == "eager")
            mask = additive(allowed, query.dtype) if base == "eager" else allowed
        output = function(module, engine.turn_queries(self.layer_idx, query), key, value, mask, **kwargs)
        engine.record(self.layer_idx, query, facts)
        self.session.unattended = None
        return output

    @staticmethod
    def _facts(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> LayerFacts:
        scale = kwargs.get("scaling")
        sinks = kwargs.get("s_aux")
        heads = key.shape[1]
        return LayerFacts(
            groups=query.shape[1] // heads,
            scale=float(scale) if scale is not None else query.shape[-1] ** -0.5,
            softcap=kwargs.get("softcap"),
            attention_sinks=None if sinks is None else sinks.detach().reshape(heads, -1),
        )

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return (columns after this pass, 0); transformers 5.2 passes the cache positions instead of a length."""
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.session.engine.columns + length, 0

    def get_seq_length(self) -> int:
        """Return the tokens seen, padding included: what transformers calls the length of a cache."""
        return self.session.engine.columns

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
