"""What is known of the forward passes of one cache: the one that is under way, and what its tokens are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import causal_mask_function

from kvpolicy.cache.engine import Engine
from kvpolicy.cache.ledger import Kind
from kvpolicy.cache.picture import LayerFacts
from kvpolicy.cache.plan import NOT_ATTACHED
from kvpolicy.errors import CacheStateError, UnsupportedError
from kvpolicy.runtimes.hf.caller import generation_loop
from kvpolicy.runtimes.hf.handover import MaskFunction, announce
from kvpolicy.runtimes.hf.late import LateCheck
from kvpolicy.runtimes.hf.masks import beyond_causal

KINDS: tuple[Kind, ...] = get_args(Kind)


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
        attending: the layer whose attention has begun and has not returned.
        unread: the mask `[B, columns]` of a step, which is read when the step begins.
    """

    columns: int
    valid: Tensor | None
    kind: Kind
    arrived: bool = False
    unattended: int | None = None
    readings: dict[int, dict[int, tuple[Tensor, LayerFacts]]] = field(default_factory=dict)
    attending: int | None = None
    unread: Tensor | None = None


class Passes:
    """The engine of one cache and the forward passes that reach it; all layers of the cache share it.

    A pass is announced by its mask (`take_mask`), opened by the first layer that stores keys (`begin`), and every layer
    that stored keys must be followed by its attention. What does not come is noticed at the next of these, or by
    `settle`, which everything that reads the cache calls first.

    Args:
        engine: what stores and evicts.
        model: the model whose passes these are; those of any other are refused.
        modules: its attention modules, by layer.
        has_images: the model knows image tokens.
    """

    def __init__(
        self, engine: Engine, model: PreTrainedModel, modules: Mapping[int, nn.Module], *, has_images: bool
    ) -> None:
        self.engine = engine
        self.has_images = has_images
        self.model = model
        self.modules = set(modules.values())
        self._configs: dict[int, Any] = {}  # by identity: configurations compare by value
        around = (m for m in model.modules() if hasattr(m, "gradient_checkpointing"))
        self._checkpointing = [m for m in around if any(inner in self.modules for inner in m.modules())]
        self.reset()

    def reset(self) -> None:
        """Forget what was announced."""
        self.current: Pass | None = None
        self.prompt_end = 0  # columns that are known to belong to a prompt, whatever length they come in
        self.expected: Kind | None = None  # what somebody said that the next pass is
        self._retracted = False  # tokens have been taken back since the last pass
        self._late = LateCheck()

    def fork(self, other: Passes) -> None:
        """Take over a copy of what another cache has seen."""
        other.check()
        with ordinary_tensors():
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

        Raises:
            UnsupportedError: another model calls, or this one will not hand its cache on to its layers.
            CacheStateError: the mask does not fit what the cache has seen, or the last pass stored nothing.
        """
        self._check_caller(kwargs.get("config"))
        seen, mask = self.engine.columns, kwargs.get("attention_mask")
        columns = kwargs["kv_length"] - seen
        if self.current is not None and (self.current.arrived or self.current.columns != columns):
            self.check()  # the pass before; some models make two masks for one pass
        kind = self._kind(columns)
        custom = None
        if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
            custom = self._build_custom(build, kwargs)
        self.current = Pass(columns, None if mask is None else self._read_mask(mask, columns), kind)
        return custom

    def _read_mask(self, mask: Tensor, columns: int) -> Tensor | None:
        """Drop what a mask `[B, seen + columns]` hides of the past; return its new columns, None if they are tokens."""
        seen = self.engine.columns
        if mask.shape[1] < seen + columns:
            raise CacheStateError(
                f"attention_mask has {mask.shape[1]} columns, but the cache has seen {seen} and {columns} more "
                f"come in; pass a mask of {seen + columns} columns."
            )
        self._late.check()
        # The first step of a turn is read on the host too: that is where masks change, and it is once in a turn.
        if columns == 1 and mask.device.type != "cpu" and self._late.follows(mask, seen):
            self._late.compare(mask, seen)
            return None
        if mask.shape[0] == len(self.engine.rows):
            with ordinary_tensors():
                self.engine.hide(mask[:, :seen].to("cpu", torch.bool))
        if columns == 1 and mask.device.type != "cpu":
            self._late.start(mask, seen)
        return mask[:, seen : seen + columns].to(torch.bool)

    def _kind(self, columns: int) -> Kind:
        """Return what the tokens of the pass that is being announced are."""
        seen, last = self.engine.columns, self.current
        loop = generation_loop() if columns > 1 or last is None or last.kind == "prompt" else None
        if loop is not None and not loop.uses_cache:
            raise UnsupportedError(
                "generate(): with use_cache=False the whole text would be fed to the cache again at every step; set "
                "use_cache=True in the call, the generation_config or the model's config."
            )
        if not seen or seen < self.prompt_end or (loop is not None and loop.chunks):
            return "prompt"
        if self.expected is not None:
            return self.expected
        if columns == 1:
            return "decode"
        return "verify" if self._retracted or (loop is not None and loop.verifies) else "prompt"

    def _check_caller(self, config: Any) -> None:
        if config is not None and id(config) not in self._configs:
            self._configs = {id(c): c for c in _configs(self.model)}
            if id(config) not in self._configs:
                raise self.foreign(config)
        for module in self._checkpointing:
            if module.gradient_checkpointing and module.training:
                raise UnsupportedError(
                    f"{type(module).__name__} is in training mode with gradient checkpointing, which takes the cache "
                    "away from its layers; call model.eval() or model.gradient_checkpointing_disable() first."
                )

    def check_module(self, module: nn.Module) -> None:
        """Raise UnsupportedError unless an attention module is one of this cache's model, wrapped since or not."""
        if module not in self.modules:
            if not any(module is own for own in self.model.modules()):
                raise self.foreign(module)
            self.modules.add(module)

    def foreign(self, caller: object) -> UnsupportedError:
        """Return the error for a forward pass of another model."""
        return UnsupportedError(
            f"this cache was made for another model than the one that calls it ({type(caller).__name__}); make a "
            "PolicyCache for each model, also for a copy of one."
        )

    def _build_custom(self, build: MaskFunction, kwargs: dict[str, Any]) -> Tensor | None:
        custom, mask = beyond_causal(build, kwargs, self.engine.columns), kwargs.get("attention_mask")
        untouched = all(row.resident == self.engine.columns for row in self.engine.rows)
        if custom is None or (untouched and (mask is None or bool(mask.all()))):
            return custom
        # Some models make masks that none of their layers uses: refuse it where it is used.
        return torch.empty(0)

    # -- arrival ------------------------------------------------------------------------------------------------------

    def arrive(self, keys: Tensor) -> Pass:
        """Return the pass that a layer's keys `[B, H, q, D]` belong to; the first layer opens it: see `begin`."""
        current = self.current
        if current is None or not current.arrived or current.unattended is not None:
            return self.begin(keys)
        return current

    def begin(self, keys: Tensor) -> Pass:
        """Open the announced pass at its first layer; check that every earlier layer's attention came by.

        Args:
            keys: `[B, H, q, D]`, those of the layer that comes by.

        Raises:
            UnsupportedError: the model does not ask the registries for its mask or its attention.
        """
        current = self.current
        if current is None:
            announce(None)  # the mask that was asked for has not been made by us, and the next one is not ours
            raise UnsupportedError(NOT_ATTACHED)
        if current.arrived:
            self.check()
            return current
        try:
            self._check_fits(current, keys)
            with ordinary_tensors():
                self._open(current, keys)
        except BaseException:
            self.current = None  # refused: nothing was stored, and nobody is to blame for it later
            raise
        self._arrived(current)
        return current

    def _arrived(self, current: Pass) -> None:
        self._retracted, self.expected = False, None
        current.arrived = True

    def _open(self, current: Pass, keys: Tensor) -> None:
        self.engine.open(keys.shape[0], current.columns, current.valid, keys.device, kind=current.kind)

    def _check_fits(self, current: Pass, keys: Tensor) -> None:
        if current.columns != keys.shape[2]:
            raise UnsupportedError(f"the mask was made for {current.columns} tokens but {keys.shape[2]} arrived.")
        known, rows = self.engine.modality, keys.shape[0]
        if known is None and self.has_images and "modality" in self.engine.policy.needs:
            raise UnsupportedError(
                f"policy {self.engine.policy.name!r} treats image tokens apart and nobody said which they are; use "
                "kvpolicy.runtimes.hf.generate(), or cache.set_modality(input_ids == image_token_id) first."
            )
        if known is not None and known.shape[0] != rows:
            raise CacheStateError(f"set_modality: the mask has {known.shape[0]} rows but the forward pass has {rows}.")

    # -- reading and rollback -----------------------------------------------------------------------------------------

    def check(self, *, at_exit: bool = False) -> None:
        """Raise an error if the last pass did not go the way that it was announced to go.

        Args:
            at_exit: nothing follows that reads the cache, so that an attention which failed, with its own error, does
                no harm.

        Raises:
            UnsupportedError: a layer's attention did not come by.
            CacheStateError: no layer came by, or an attention failed.
        """
        self._late.check()
        current = self.current
        if current is None:
            return
        if not current.arrived:
            self.current = None
            raise CacheStateError(
                f"the last forward pass announced {current.columns} tokens and no layer stored any: it was "
                "interrupted, or the model did not hand its cache on to its layers; feed these tokens again, with "
                "use_cache=True and in a model that is not training."
            )
        if current.attending is not None and not at_exit:
            raise CacheStateError(
                f"the last forward pass failed in the attention of layer {current.attending}, so the cache is "
                "incomplete; call reset() or use a new cache."
            )
        for own, calls in ({} if at_exit else current.readings).items():
            raise CacheStateError(
                f"the last forward pass stopped after layer {max(calls)}, before other layers had read the keys of "
                f"layer {own}, so the cache is incomplete; call reset() or use a new cache."
            )
        if current.unattended is not None:
            raise UnsupportedError(
                f"the attention of layer {current.unattended} did not go through transformers' attention registry "
                "while this cache was in use; do not change the model's attention implementation inside the cache's "
                "`with` block."
            )

    def settle(self) -> None:
        """Check the last pass and run the compactions that are due; what reads the cache calls it first."""
        self.check()
        with ordinary_tensors():
            self.engine.settle()

    def compact(self, *, fit: bool = True) -> None:
        """Compact every row above its budget, whatever trigger and phase say; `fit` also gives back unused memory."""
        self.check()
        with ordinary_tensors():
            self.engine.settle(every=True)
            if fit and self.engine.rows:
                self.engine.stores.fit(self.engine.held(slice(None)).longest)

    def take_rows(self, index: Tensor) -> None:
        """Reorder, repeat or select rows; `index` int64 `[B']`. Nothing happens to a cache that is empty."""
        if self.engine.rows:
            self._late.forget()
            with ordinary_tensors():
                self.engine.take_rows(index)

    def crop(self, columns: int) -> None:
        """Take back the last `columns` columns, at least one; the next tokens that come together are a verification."""
        self._late.forget()
        with ordinary_tensors():
            self.engine.crop(columns)
        self.prompt_end = min(self.prompt_end, self.engine.columns)
        self._retracted = True


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make tensors that can be written to later, also when this runs under ``torch.inference_mode()``.

    A tensor that is made under inference mode can be changed nowhere else, and a cache may be filled under it and go on
    without it.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _configs(model: nn.Module) -> Iterator[Any]:
    """Yield the configurations of a model and its parts, and those that these contain."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            yield config
            yield from (value for value in vars(config).values() if hasattr(value, "model_type"))
