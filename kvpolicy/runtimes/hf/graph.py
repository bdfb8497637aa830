"""Decode steps as one graph: what can be traced of a cache, and what the host does before each step.

A step is opened on the host (`GraphPasses.begin_step`): its mask is read, rows that are due are compacted, its tokens
are counted. What a model's layers then do with the cache is tensors only, and the same in every step, so that it can be
traced once. The host's part comes before the graph's because the model's `forward` is wrapped while such a cache is
attached; a graph that runs without it stops at a guard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from kvpolicy.cache.graph import GraphEngine, LayerStep
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf.attention import packed_attention, packs
from kvpolicy.runtimes.hf.handover import AttentionFunction, MaskFunction, mark
from kvpolicy.runtimes.hf.implementations import additive
from kvpolicy.runtimes.hf.layer import EvictingLayer
from kvpolicy.runtimes.hf.passes import Pass, Passes, ordinary_tensors


class GraphPasses(Passes):
    """The forward passes of a cache whose steps of one token can be one graph.

    Attributes:
        layers: layer index -> the cache's layer.
    """

    engine: GraphEngine
    layers: Mapping[int, GraphLayer]

    def take_mask(self, build: MaskFunction, kwargs: dict[str, Any]) -> Tensor | None:
        """Announce a forward pass, unless it is a step that has been opened.

        `generate` has masks made for caches like this before it calls the model, and once more when it does. What it
        is given the first time, the padding `[B, columns]`, is what the second time must be told.
        """
        if torch.compiler.is_compiling():
            check_causal(kwargs)
            return None  # the layers check that a step has been opened
        mask: Tensor | None = kwargs.get("attention_mask")
        columns = kwargs["kv_length"] - self.engine.columns
        if self.engine.turn.ready and columns == 1:
            self._check_caller(kwargs.get("config"))
            check_causal(kwargs)
            return None
        if columns != 1 or not self.engine.columns:
            custom = super().take_mask(build, kwargs)
            return mask if custom is None else custom
        self._check_caller(kwargs.get("config"))
        check_causal(kwargs)
        self._announce(mask)
        return mask

    def _announce(self, mask: Tensor | None) -> None:
        """Announce a step of one token; its mask is read when it begins."""
        if self.current is not None and (self.current.arrived or self.current.columns != 1):
            self.check()
        self.current = Pass(1, None, self._kind(1), unread=mask)

    def begin_step(self, batch: int, mask: Tensor | None) -> bool:
        """Open a step of one token per row; return False where it must run as any other pass does.

        Args:
            batch: rows of the pass.
            mask: `[B, columns]`, of everything seen and the step's tokens, or None.
        """
        if self.engine.turn.ready and batch == len(self.engine.rows):
            return True  # it was opened before, and its forward pass did not come yet
        if not self.engine.columns:
            return False
        self._announce(mask)
        assert self.current is not None
        try:
            with ordinary_tensors():
                self._open_step(self.current, batch)
        except BaseException:
            self.current = None
            raise
        if not self.engine.turn.ready:
            self.current = None  # its mask announces it once more
            return False
        self._arrived(self.current)
        return True

    def begin_by_hand(self, mask: Tensor | None) -> bool:
        """As `begin_step` for all rows; an open step is an error, for a replayed graph cannot say that it ran."""
        if self.engine.turn.ready:
            raise CacheStateError(
                "begin_step: the step that was begun before has not run; run it, and call end_step() behind the replay "
                "of a captured graph."
            )
        return self.begin_step(len(self.engine.rows), mask)

    def end_by_hand(self) -> bool:
        """Close the step that a replayed graph has run; return whether one was open."""
        was_open, self.engine.turn.ready = self.engine.turn.ready, False
        return was_open

    def _open(self, current: Pass, keys: Tensor) -> None:
        if current.columns == 1 and self.engine.columns:
            self._open_step(current, keys.shape[0])
        if not self.engine.turn.ready:
            super()._open(current, keys)

    def _open_step(self, current: Pass, batch: int) -> None:
        if current.unread is not None:
            current.valid = self._read_mask(current.unread, 1)
            current.unread = None
        if current.valid is not None and not bool(current.valid.all()):
            return  # a row that sits a step out
        self.engine.open_step(batch, current.kind)
        for index, layer in self.layers.items():
            step = self.engine.steps[index]
            if layer.step is not step:
                layer.step = step
                layer.scale = self.engine.facts[index].scale
                mark(step.keys, layer)

    def check(self, *, at_exit: bool = False) -> None:
        """Raise an error if the last pass did not go the way that it was announced to go; see `Passes.check`."""
        if self.engine.turn.ready:
            self.current = None
            with ordinary_tensors():
                self.engine.give_up_step()
            raise CacheStateError(
                "the last step was opened and no forward pass of the model ran it: it was interrupted, or the model "
                "did not hand its cache on to its layers; feed its token again."
            )
        super().check(at_exit=at_exit)

    def reset(self) -> None:
        """Forget what was announced."""
        super().reset()
        for layer in getattr(self, "layers", {}).values():
            layer.step = None


def check_causal(kwargs: Mapping[str, Any]) -> None:
    """Raise UnsupportedError if a step's mask is to be made by a function of the model's own."""
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise UnsupportedError(
            "graph: this model asks for a mask that is not simply causal at a decode step, which a graph over the "
            "rows' lengths does not know; leave out graph=True."
        )


class GraphLayer(EvictingLayer):
    """An evictable layer whose steps of one token are tensors only.

    Attributes:
        step: what it reads and writes; None before the first step.
        scale: factor of the logits.
    """

    passes: GraphPasses
    step: LayerStep | None = None
    scale: float = 1.0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys `[B, H, q, D]` and values; return views over what is resident, or all slots in a step."""
        if not torch.compiler.is_compiling():
            if not self._opened():
                self.passes.arrive(key_states)
            if not self._opened():
                return super().update(key_states, value_states, *args, **kwargs)
        step = self.step
        if step is None or not step.turn.ready or key_states.shape[2] != 1:
            raise CacheStateError(
                "graph: a compiled forward pass brings one token per row, and cache.begin_step() comes before it "
                "where the model's own forward() is not what is called; run prompts, and steps with padding, with "
                "the model as it is."
            )
        if key_states.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError("PolicyCache is for inference: call the model under torch.no_grad().")
        step.write(key_states, value_states)
        return step.keys, step.values

    def _opened(self) -> bool:
        return self.step is not None and self.step.turn.ready

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
        """Run the model's own attention function; in a step, over all slots with a mask by the rows' lengths."""
        if mask is not None and mask.dim() == 2:
            mask = None  # padding, which has been read: see `GraphPasses.take_mask`
        step = self.step
        if step is None or not step.turn.ready:
            return super().attend(function, base, module, query, key, value, mask, kwargs)
        if mask is not None:
            raise UnsupportedError(
                "graph: the attention mask of a step is a finished 4-D one; give a 2-D mask, or none, for what the "
                "step's token sees follows from what its row holds."
            )
        visible, turned = step.visible(), step.turned(query)
        if packs(function, query, kwargs):
            output: tuple[Tensor, Tensor | None] = packed_attention(turned, key, value, self.scale, visible), None
        else:
            allowed = additive(visible, query.dtype) if base == "eager" else visible
            output = function(module, turned, key, value, allowed, **kwargs)
        step.record(query)
        if step.last:
            step.turn.ready = False
        return output

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return (columns after this pass, 0), and in a graph the slots in place of the columns."""
        if torch.compiler.is_compiling() and self.step is not None:
            return self.step.slots.shape[0], 0
        return super().get_mask_sizes(query_length)

    def get_seq_length(self) -> Any:
        """Return the tokens seen, padding included; a tensor on the device in a graph, as a static cache does."""
        if torch.compiler.is_compiling() and self.step is not None:
            return self.step.columns
        return super().get_seq_length()
