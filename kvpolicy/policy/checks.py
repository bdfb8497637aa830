"""Looks at what components return, on the host: shapes, dtypes, devices, names, and whether they wrote to their input.

Nothing here reads a tensor's content; that is for `kvpolicy.policy.findings`, which reads once per compaction.
Every message is one sentence that names the component and the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy.contracts.component import named
from kvpolicy.contracts.components import Component, NewTokens, PostOperation
from kvpolicy.contracts.view import CacheView
from kvpolicy.errors import ComponentError, ScoreError
from kvpolicy.types import Counts, KeepIndices, Mask, Scores

_REPLACES: Mapping[str, tuple[str, ...]] = {
    "positions": ("keys", "rope_positions"),
    "values": ("values",),
    "keys": ("keys", "values"),
}
"""What a post-operation declares to change -> the names that it may return."""


class Untouched:
    """Notices that a component wrote to tensors that it was given, by their version counters: no device is asked.

    Writes that go around the counter (`.data`, a NumPy view) and those to inference tensors, which have no counter, are
    left to the law `inputs_untouched`, which compares contents.
    """

    def __init__(self, layer: int, tensors: Iterator[tuple[str, Tensor | None]]) -> None:
        """Note the versions of tensors by name, for messages about a layer."""
        self._layer = layer
        # A slice counts with the storage that it is a slice of, so a write through any alias shows.
        self._noted = [(name, t, t._version) for name, t in tensors if t is not None and not t.is_inference()]  # noqa: SLF001

    @staticmethod
    def of(view: CacheView) -> Untouched:
        """Note the tensors of a view."""
        return Untouched(view.layer_idx, _tensors(view))

    def by(self, component: Component) -> None:
        """Raise ComponentError if something has been written to since, by this component."""
        for name, tensor, version in self._noted:
            if tensor._version != version:  # noqa: SLF001
                raise ComponentError(
                    f"{named(component)} in layer {self._layer}: wrote to `{name}`, which belongs to the cache or to "
                    "other components; compute a new tensor instead."
                )


def scores(made: Scores, view: CacheView, component: Component) -> Scores:
    """Return the scores; raises ScoreError unless they are fp32 `[B, H, N]` on the view's device."""
    wrong = _unlike(made, view.shape, torch.float32, view.device)
    if wrong is not None:
        raise ScoreError(
            f"{named(component)} in layer {view.layer_idx}: returned {wrong}; return one fp32 number for every slot."
        )
    return made


def mask(made: Mask, view: CacheView, component: Component) -> Mask:
    """Return the mask; raises ComponentError unless it is bool `[B, H, N]` on the view's device."""
    _expect(made, view.shape, torch.bool, view.device, f"{named(component)} in layer {view.layer_idx}")
    return made


def counts(made: Sequence[Counts], like: Sequence[Tensor], layers: Sequence[int], component: Component) -> list[Counts]:
    """Return an allocation as a list; raises ComponentError unless it is int64 `[B, H]` for every layer.

    Args:
        made: what the allocator returned.
        like: `[B, H]` tensors of each layer, where the layer is.
        layers: their indices.
        component: the allocator.
    """
    if not isinstance(made, list | tuple) or len(made) != len(like):
        got = f"{len(made)} tensors" if isinstance(made, list | tuple) else type(made).__name__
        raise ComponentError(
            f"{named(component)}: returned {got} for the {len(like)} layers {_some(layers)}; return a list with one "
            "int64 [B, H] tensor per layer."
        )
    for count, other, layer in zip(made, like, layers, strict=True):
        _expect(count, other.shape, torch.int64, other.device, f"{named(component)} in layer {layer}")
    return list(made)


def kept(made: KeepIndices, allowed: Mask, layer: int, component: Component) -> KeepIndices:
    """Return what a selector keeps of `[B, H, N]` slots; raises ComponentError unless it could be slots of these."""
    who = f"{named(component)} in layer {layer}"
    if not isinstance(made, KeepIndices):
        raise ComponentError(f"{who}: returned {type(made).__name__} instead of KeepIndices; see `ops.top_k`.")
    batch, heads, slots = allowed.shape
    columns = made.indices.shape[-1] if isinstance(made.indices, Tensor) and made.indices.dim() == 3 else 0
    _expect(made.indices, (batch, heads, columns), torch.int64, allowed.device, f"{who} (indices)")
    _expect(made.lengths, (batch, heads), torch.int64, allowed.device, f"{who} (lengths)")
    if columns > slots:
        raise ComponentError(f"{who}: returned {columns} slots of {slots} for each head; name each slot at most once.")
    return made


def state(made: Mapping[str, Tensor], view: CacheView, component: Component) -> Mapping[str, Tensor]:
    """Return new slot state; raises ComponentError unless names, shapes and dtypes are those that were declared."""
    return _state(made, view.shape, view.device, view.layer_idx, component)


def entering(made: Mapping[str, Tensor], tokens: NewTokens, component: Component) -> Mapping[str, Tensor]:
    """Return the slot state of new tokens, `[B, H, q]`; raises ComponentError as `state`."""
    return _state(made, tokens.shape, tokens.hidden_states.device, tokens.layer_idx, component)


def _state(
    made: Mapping[str, Tensor], shape: Sequence[int], device: torch.device, layer: int, component: Component
) -> Mapping[str, Tensor]:
    who = f"{named(component)} in layer {layer}"
    declared = {each.name: each.dtype for each in component.slot_state()}
    for name, tensor in _mapping(made, who).items():
        if name not in declared:
            raise ComponentError(
                f"{who}: returned slot state {name!r}, and declares {', '.join(declared) or 'none'} in `slot_state`."
            )
        _expect(tensor, shape, declared[name], device, f"{who} (slot state {name!r})")
    return made


def replacements(made: Mapping[str, Tensor], view: CacheView, component: PostOperation) -> Mapping[str, Tensor]:
    """Return what a post-operation replaces; raises ComponentError unless names, shapes and dtypes fit."""
    who = f"{named(component)} in layer {view.layer_idx}"
    there = {"keys": view.keys, "values": view.values, "rope_positions": view.positions}
    for name, tensor in _mapping(made, who).items():
        if name not in _REPLACES[component.changes]:
            raise ComponentError(
                f"{who}: replaces {name!r}, and declares `changes = {component.changes!r}`, which may replace "
                f"{' and '.join(_REPLACES[component.changes])}."
            )
        old = there[name]
        _expect(tensor, old.shape, old.dtype, old.device, f"{who} ({name})")
    return made


def _mapping(made: Mapping[str, Tensor], who: str) -> Mapping[str, Tensor]:
    if not isinstance(made, Mapping):
        raise ComponentError(f"{who}: returned {type(made).__name__} instead of a mapping from names to tensors.")
    return made


def _tensors(view: CacheView) -> Iterator[tuple[str, Tensor | None]]:
    for name in (
        *("keys", "values", "positions", "valid", "queries", "query_positions", "query_valid", "attention_sinks"),
        *("rope_positions", "prompt_length", "seen", "compaction", "budget"),
    ):
        yield f"view.{name}", getattr(view, name)
    if view.rope is not None:
        yield "view.rope.inv_freq", view.rope.inv_freq
    for field, tensors in (("state", view.state), ("extras", view.extras)):
        for name, tensor in tensors.items():
            yield f"view.{field}[{name!r}]", tensor


def _expect(made: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device, who: str) -> None:
    wrong = _unlike(made, shape, dtype, device)
    if wrong is not None:
        raise ComponentError(f"{who}: returned {wrong}.")


def _unlike(made: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Say how a result differs from what it should be, or return None."""
    if isinstance(made, Tensor) and made.shape == tuple(shape) and made.dtype == dtype and made.device == device:
        return None
    if not isinstance(made, Tensor):
        return f"{type(made).__name__} instead of {dtype} {list(shape)}"
    here, there = (f" on {made.device}", f" on {device}") if made.device != device else ("", "")
    return f"{made.dtype} {list(made.shape)}{here} instead of {dtype} {list(shape)}{there}"


def _some(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
