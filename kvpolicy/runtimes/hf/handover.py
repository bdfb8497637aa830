"""What has to reach our functions past transformers' interfaces.

transformers asks a cache for its sizes and then calls the registered mask function, which is given no cache; and it
hands what a cache returns to the registered attention function, which is given no cache either. So the cache that was
asked last is remembered per thread (two threads may run two models) until the next mask is made, and the keys that a
layer returns carry a reference to their layer. Both references are weak: strong ones would keep a cache alive, and with
it its model. A policy that asks for hidden states gets them the same way: a module's hooks (`hidden`) leave what it
was called with until its attention has been computed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
MaskFunction = Callable[..., Tensor | None]


class MaskReader(Protocol):
    """What stands behind a cache, to the mask function that works for it."""

    def take_mask(self, build: MaskFunction, kwargs: dict[str, Any]) -> Tensor | None:
        """Read the padding off the mask arguments; return None if layers can make their own masks."""


class Attending(Protocol):
    """A layer of a cache, to the attention function that works for it."""

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
        """Run `function` over what the layer holds."""


_MARK = "_kvpolicy_layer"
_asked = threading.local()
_read = threading.local()


def announce(reader: MaskReader | None) -> None:
    """Say whom the next mask of this thread is for; None for layers that are not ours."""
    _asked.reader = None if reader is None else weakref.ref(reader)


def announced() -> MaskReader | None:
    """Return whom the mask that is being made is for, once."""
    reference = getattr(_asked, "reader", None)
    _asked.reader = None
    return None if reference is None else reference()


def mark(keys: Tensor, layer: Attending) -> None:
    """Let keys remember their layer."""
    setattr(keys, _MARK, weakref.ref(layer))


def owner(keys: Tensor) -> Attending | None:
    """Return the layer that keys came from, if it is ours."""
    reference = getattr(keys, _MARK, None)
    return None if reference is None else reference()


def hand_over(module: nn.Module, hidden_states: Tensor | None) -> None:
    """Leave what a module has been called with for its attention; None when its forward pass is over."""
    _read.states = None if hidden_states is None else (id(module), hidden_states)


def handed_over(module: nn.Module) -> Tensor | None:
    """Return what a module whose forward pass is under way in this thread has been called with, if it was left."""
    states: tuple[int, Tensor] | None = getattr(_read, "states", None)
    return None if states is None or states[0] != id(module) else states[1]
