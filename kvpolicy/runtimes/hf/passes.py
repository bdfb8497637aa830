"""What is known of the forward passes of one cache: the one that is under way, and what its tokens are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from kvpolicy.cache.engine import Engine
from kvpolicy.cache.picture import LayerFacts
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf.caller import generation_loop
from kvpolicy.runtimes.hf.handover import MaskFunction
from kvpolicy.runtimes.hf.masks import beyond_causal

Kind = Literal["prompt", "decode", "verify"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_UNCHECKED_MOST = 64  # decode masks on a GPU are read back together, once in so many steps


@dataclass
class Pass:
    """One forward pass, from the mask that announces it to the attention of its last layer.

    Attributes:
        columns: tokens per row, padding included.
        valid: bool `[B, columns]`, False for padding; None when no token is padding.
        kind: part of a prompt, a decode step, or candidates that may be taken back.
        arrived: a layer has come by, so that the engine has opened the pass.
        unattended: the layer whose keys have been stored and whose attention is still to come.
        readings: layer whose keys several layers read -> reader -> its queries and what its call told, until all have
            come by.
    """

    columns: int
    valid: Tensor | None
    kind: Kind
    arrived: bool = False
    unattended: int | None = None
    readings: dict[int, dict[int, tuple[Tensor, LayerFacts]]] = field(default_factory=dict)


class Passes:
    """The engine of one cache and the forward passes that reach it; all layers of the cache share it.

    A pass is announced by its mask (`take_mask`), opened by the first layer that stores keys (`begin`), and every layer
    that stored keys must be followed by its attention. What does not come is noticed at the next of these, or by
    `check`, which everything that reads the cache calls first.

    Args:
        engine: what stores and evicts.
        has_images: the model knows image tokens.
    """

    def __init__(self, engine: Engine, *, has_images: bool) -> None:
        self.engine = engine
        self.has_images = has_images
        self.reset()

    def reset(self) -> None:
        """Forget what was announced."""
        self.current: Pass | None = None
        self.prompt_end = 0  # columns that are known to belong to a prompt, whatever length they come in
        self.expected: Kind | None = None  # what somebody said that the next pass is
        self._retracted = False  # tokens have been taken back since the last pass
        self._unchecked: list[Tensor] = []

    def fork(self, other: Passes) -> None:
        """Take over a copy of what another cache has seen."""
        self.engine = other.engine.clone()
        self.prompt_end, self.expected, self._retracted = other.prompt_end, other.expected, other._retracted

    # -- announcement -------------------------------------------------------------------------------------------------

    def take_mask(self, build: MaskFunction, kwargs: dict[str, Any]) -> Tensor | None:
        """Announce a forward pass: read the padding off its mask arguments.

        Args:
            build: the mask function of the model's own implementation.
            kwargs: what transformers calls it with.

        Returns:
            None if layers can make their own masks, else the mask for all of them.
        """
        self._check_readings()
        seen, mask = self.engine.columns, kwargs.get("attention_mask")
        columns = kwargs["kv_length"] - seen
        kind = self._kind(columns)
        custom = None
        if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
            custom = self._build_custom(build, kwargs)
        valid = None
        if mask is not None:
            if mask.shape[1] < seen + columns:
                raise CacheStateError(
                    f"attention_mask has {mask.shape[1]} columns, but the cache has seen {seen} and {columns} more "
                    f"come in; pass a mask of {seen + columns} columns."
                )
            valid = mask[:, seen : seen + columns].to(torch.bool)
            if columns > 1 and seen:
                self.engine.hide(mask[:, :seen].to("cpu", torch.bool))
            if columns == 1 and valid.device.type != "cpu":
                # Reading every step's mask would make the host wait for the GPU each time.
                self._unchecked.append(valid)
                valid = None
            if len(self._unchecked) >= _UNCHECKED_MOST or columns > 1:
                self._check_decode_masks()
        self.current = Pass(columns, valid, kind, unattended=self.current.unattended if self.current else None)
        return custom

    def _kind(self, columns: int) -> Kind:
        """Return what the tokens of the pass that is being announced are."""
        seen, last = self.engine.columns, self.current
        loop = generation_loop() if columns > 1 or last is None or last.kind == "prompt" else None
        if not seen or seen < self.prompt_end or (loop is not None and loop.chunks):
            return "prompt"
        if self.expected is not None:
            return self.expected
        if columns == 1:
            return "decode"
        return "verify" if self._retracted or (loop is not None and loop.verifies) else "prompt"

    def _check_decode_masks(self) -> None:
        if self._unchecked and not bool(torch.cat(self._unchecked).all()):
            raise CacheStateError(
                "attention_mask hides a token of a decode step, which is not supported on this device; "
                "leave finished rows visible, as generate() does."
            )
        self._unchecked.clear()

    def _build_custom(self, build: MaskFunction, kwargs: dict[str, Any]) -> Tensor | None:
        custom, mask = beyond_causal(build, kwargs, self.engine.columns), kwargs.get("attention_mask")
        untouched = all(row.resident == self.engine.columns for row in self.engine.rows)
        if custom is None or (untouched and (mask is None or bool(mask.all()))):
            return custom
        # Some models make masks that none of their layers uses: refuse it where it is used.
        return torch.empty(0)

    # -- arrival ------------------------------------------------------------------------------------------------------

    def begin(self, keys: Tensor) -> Pass:
        """Open the announced pass at its first layer; check that every earlier layer's attention came by.

        Args:
            keys: `[B, H, q, D]`, those of the layer that comes by.

        Raises:
            UnsupportedError: the model does not ask the registries for its mask or its attention.
        """
        current = self.current
        if current is None:
            raise UnsupportedError(
                "this cache is not attached to the model that uses it, or the attention mask is a finished 4-D "
                "one; call the model that the cache was made for, inside the cache's `with` block, with a 2-D mask."
            )
        if current.unattended is not None:
            raise UnsupportedError(
                f"the attention of layer {current.unattended} did not go through transformers' attention registry "
                "while this cache was in use; do not change the model's attention implementation inside the cache's "
                "`with` block."
            )
        if not current.arrived:
            self._check_modality(keys.shape[0])
            if current.columns != keys.shape[2]:
                raise UnsupportedError(f"the mask was made for {current.columns} tokens but {keys.shape[2]} arrived.")
            if current.kind != "prompt" and current.columns > 1:
                self.engine.crop(0)  # the engine takes what follows a crop for a verification
            self.engine.open(
                keys.shape[0], current.columns, current.valid, keys.device, prefill=current.kind == "prompt"
            )
            self._retracted, self.expected = False, None
            current.arrived = True
        return current

    def _check_modality(self, rows: int) -> None:
        known = self.engine.modality
        if known is None and self.has_images and "modality" in self.engine.policy.needs:
            raise UnsupportedError(
                f"policy {self.engine.policy.name!r} treats image tokens apart and nobody said which they are; use "
                "kvpolicy.runtimes.hf.generate(), or cache.set_modality(input_ids == image_token_id) first."
            )
        if known is not None and known.shape[0] != rows:
            raise CacheStateError(f"set_modality: the mask has {known.shape[0]} rows but the forward pass has {rows}.")

    def _check_readings(self) -> None:
        for own, calls in ({} if self.current is None else self.current.readings).items():
            raise CacheStateError(
                f"the last forward pass stopped after layer {max(calls)}, before other layers had read the keys of "
                f"layer {own}, so the cache is incomplete; call reset() or use a new cache."
            )

    # -- reading and rollback -----------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Check the last pass and run the compactions that are due; what reads the cache calls it first."""
        self._check_decode_masks()
        self._check_readings()
        self.engine.settle()

    def crop(self, columns: int) -> None:
        """Take back the last `columns` columns, at least one; the next tokens that come together are a verification."""
        self.engine.crop(columns)
        self.prompt_end = min(self.prompt_end, self.engine.columns)
        self._retracted = True
