"""A model's configurations are switched to our attention implementation for as long as a cache is attached to it."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

from torch import nn
from transformers import PreTrainedModel

from kvpolicy.errors import UnsupportedError
from kvpolicy.runtimes.hf.attention import base_attention, register
from kvpolicy.runtimes.hf.implementations import family


class Switched(str):
    """The name of our implementation in a configuration, which knows what stood there before.

    A copied, pickled or saved configuration gets what stood there before: a copy of an attached model is as if it had
    never been attached, and loads where kvpolicy is not installed.

    Attributes:
        before: what the configuration named before, None where it named nothing.
        uses: attachments that are not undone.
    """

    __slots__ = ("_config", "before", "uses")

    before: str | None
    uses: int
    _config: weakref.ref[Any]

    @classmethod
    def of(cls, config: Any, base: str) -> Self:
        """Return the name to put into a configuration whose implementation is `base`."""
        name = cls(register(base))
        name.before, name.uses, name._config = config._attn_implementation_internal, 0, weakref.ref(config)
        return name

    def stands_in(self, config: Any) -> bool:
        """Whether this name was made for a configuration, which a shallow copy of one does not say by itself."""
        return self._config() is config

    def __deepcopy__(self, memo: dict[int, Any]) -> str | None:
        return self.before

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (type(None), ()) if self.before is None else (str, (self.before,))


lock = threading.Lock()
_left: deque[Callable[[], None]] = deque()


def attach(model: PreTrainedModel, modules: dict[int, nn.Module]) -> Callable[[], None]:
    """Switch a model to the wrapping implementation; return a function that undoes it (the last one restores).

    The function may be called by a finalizer, at any allocation and in the middle of another `attach`: it never waits
    for a lock. Where one is held, whoever holds it undoes the attachment before it goes on.

    Raises:
        UnsupportedError: the model's attention cannot be wrapped.
    """
    kinds = {type(module.config) for module in modules.values()}
    owners = (getattr(module, "config", None) for module in model.modules())
    configs: list[Any] = list({id(config): config for config in owners if type(config) in kinds}.values())
    try:
        with lock:
            made = [(config, _switch(config, modules)) for config in configs]
            changes = [partial(_leave, config, name) for config, name in made]
            for _, name in made:
                name.uses += 1
            try:
                for config, name in made:
                    config._attn_implementation_internal = name
            except ValueError as error:  # GPT-OSS in transformers 5.2 takes certain names only
                _left.extend(changes)
                raise UnsupportedError(
                    f"{type(model).__name__}: this version of transformers lets no other function stand in for "
                    f"{name.before!r}; load the model with attn_implementation='eager', or use a newer transformers."
                ) from error
    finally:
        undo_left()
    return partial(undo, changes)


def undo(changes: Sequence[Callable[[], None]]) -> None:
    """Run functions that undo something under `lock`, here or in whoever holds it."""
    _left.extend(changes)
    undo_left()


def _leave(config: Any, name: Switched) -> None:
    name.uses -= 1
    # Somebody may have chosen another implementation meanwhile; that choice stays.
    if not name.uses and config._attn_implementation_internal is name:
        config._attn_implementation_internal = name.before


def implementation_of(config: Any) -> str:
    """Return the name of a configuration's own attention implementation, attached or not."""
    current = config._attn_implementation_internal
    return str((current.before if isinstance(current, Switched) else config._attn_implementation) or "eager")


def _switch(config: Any, modules: dict[int, nn.Module]) -> Switched:
    """Return the name that a configuration has, or is to have, while it is attached."""
    current = config._attn_implementation_internal
    if isinstance(current, Switched):
        if current.stands_in(config):
            return current
        config._attn_implementation_internal = current.before
    base = implementation_of(config)
    family(base)  # or refuse it
    for module in modules.values():
        base_attention(module, base)
    return Switched.of(config, base)


def undo_left() -> None:
    """Undo what is waiting for `lock`, unless somebody holds it, who will; called after every use of it."""
    while _left and lock.acquire(blocking=False):
        try:
            while _left:
                _left.popleft()()
        finally:
            lock.release()
