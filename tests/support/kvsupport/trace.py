"""A `PolicyCache` that writes down everything that happens to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy.policy.policy import Policy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf.handover import AttentionFunction
from kvpolicy.runtimes.hf.hidden import hidden_states
from kvpolicy.runtimes.hf.layer import EvictingLayer
from kvpolicy.runtimes.hf.passes import Passes
from kvsupport.events import Crop, LayerInfo, LayerPass, PassEvent, RowsTaken, Settled, Trace

if TYPE_CHECKING:
    from kvpolicy.spec import PolicySpec


class _TracingLayer(EvictingLayer):
    """An evictable layer that adds its part to the trace; it changes nothing."""

    def __init__(self, passes: Passes, layer_idx: int, trace: Trace, *, outputs: bool) -> None:
        super().__init__(passes, layer_idx)
        self.trace = trace
        self.outputs = outputs

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Note the new keys and values, and what is held with them."""
        result: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        engine = self.passes.engine
        if engine.forward is None:
            raise AssertionError("a layer was updated without a forward pass")
        if self.layer_idx == engine.layers[0]:
            self.trace.events.append(PassEvent(engine.forward.query_valid.clone(), prefill=not engine.decoding))
        store = engine.stores[self.layer_idx]
        slots = store.read(self.layer_idx, engine.held(slice(None)))
        held = [
            [positions[valid].tolist() for positions, valid in zip(*row, strict=True)]
            for row in zip(slots.positions, slots.valid, strict=True)
        ]
        current = self.trace.passes[-1]
        current.layers[self.layer_idx] = LayerPass(
            key_states.detach().clone(), value_states.detach().clone(), held=held
        )
        return result

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
        """Note the queries and what the attention makes of them."""
        output = super().attend(function, base, module, query, key, value, mask, kwargs)
        noted = self.trace.passes[-1].layers[self.layer_idx]
        noted.queries = query.detach().clone()
        if "hidden_states" in self.passes.engine.policy.needs:
            noted.hidden = hidden_states(module, query.shape[2]).clone()
        if self.outputs:
            noted.output = output[0].detach().clone()
        if self.layer_idx not in self.trace.layers:
            heads, groups = key.shape[1], query.shape[1] // key.shape[1]
            sinks, scale = kwargs.get("s_aux"), kwargs.get("scaling")
            rope = self.passes.engine.ropes.get(self.layer_idx)
            after: Any = getattr(getattr(module, "o_proj", None), "weight", None)
            self.trace.layers[self.layer_idx] = LayerInfo(
                heads,
                groups,
                scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
                softcap=kwargs.get("softcap"),
                attention_sinks=None if sinks is None else sinks.detach().reshape(heads, groups).clone(),
                inv_freq=None if rope is None else rope.inv_freq.clone(),
                interleaved=rope is not None and rope.interleaved,
                output_projection=None if after is None else after.detach().T.unflatten(0, (heads, groups, -1)),
            )
        return output


class TracedCache(PolicyCache):
    """A `PolicyCache` whose `trace` holds the tensors of every forward pass; for short texts, it keeps all of them.

    Args:
        policy, model: as for `PolicyCache`.
        outputs: also keep what each layer's attention returned.
    """

    def __init__(
        self, policy: Policy | PolicySpec | str | Path, model: PreTrainedModel, *, outputs: bool = False
    ) -> None:
        super().__init__(policy, model)
        self.trace = Trace(self.engine.num_layers)
        for i in self.engine.layers:
            self.layers[i] = _TracingLayer(self._passes, i, self.trace, outputs=outputs)

    def settled(self) -> dict[int, list[list[list[int]]]]:
        """Run the compactions that are due, as `kept` does, and return the positions of `[layer][row][head]`."""
        rows, heads = range(len(self.engine.rows)), {i: info.heads for i, info in self.trace.layers.items()}
        held = {
            layer: [[self.kept(layer, head, row) for head in range(heads[layer])] for row in rows]
            for layer in self.engine.layers
        }
        self.trace.events.append(Settled(held))
        return held

    def crop(self, tokens: int) -> None:
        """Crop as `PolicyCache` does, and note how many columns went."""
        before = self.engine.columns
        super().crop(tokens)
        self.trace.events.append(Crop(before - self.engine.columns))

    def reset(self) -> None:
        """Forget everything, the trace too."""
        super().reset()
        self.trace.events.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the rows."""
        super().reorder_cache(beam_idx)
        self.trace.events.append(RowsTaken(beam_idx.tolist()))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows."""
        super().batch_select_indices(indices)
        index = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self.trace.events.append(RowsTaken(index.tolist()))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the rows."""
        rows = len(self.engine.rows)
        super().batch_repeat_interleave(repeats)
        self.trace.events.append(RowsTaken([b for b in range(rows) for _ in range(repeats)]))
