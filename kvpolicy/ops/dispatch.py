"""Which implementation of the operations is used: plain torch, or one that a plugin brings.

A policy names its backend; while it runs, `using_backend` makes it the one that the operations of `kvpolicy.ops` take.
The plain-torch function stays the definition of right, and runs whatever a backend does not bring.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar

from torch import Tensor

from kvpolicy.contracts.backend import Backend
from kvpolicy.errors import UnsupportedError, did_you_mean
from kvpolicy.ops import arguments

BACKENDS: Final = ("auto", "torch", "triton")
"""What the field `backend` of a policy may always say; `backend_names` has those that are registered too."""

BACKEND_VARIABLE: Final = "KVPOLICY_BACKEND"
"""Environment variable: the backend of policies that say `auto`; any registered name."""

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger("kvpolicy")


@dataclass(frozen=True)
class _Scope:
    backend: str
    scratch: dict[str, Any] | None


_homes: dict[str, str] = {}  # module of each operation
_scope: ContextVar[_Scope | None] = ContextVar("kvpolicy_backend", default=None)


@contextmanager
def using_backend(backend: str, *, shared: bool = False) -> Iterator[None]:
    """Make the operations take `backend` inside the block and this context.

    Args:
        backend: ``auto``, ``torch`` or the name of a registered backend.
        shared: importance and redundancy of the same keys will both be asked for and nothing changes in between, so
            that a backend may leave in `scratch` for the second what it has read for the first.
    """
    token = _scope.set(_Scope(backend, {} if shared else None))
    try:
        yield
    finally:
        _scope.reset(token)


def scratch() -> dict[str, Any] | None:
    """Return what a backend may keep until the end of the block, or None when nothing is shared."""
    scope = _scope.get()
    return None if scope is None else scope.scratch


def requested(backend: str | None = None) -> str:
    """Return the backend asked for: `backend`, or that of the running policy, or the environment's if it is `auto`."""
    if backend is None:
        scope = _scope.get()
        backend = "auto" if scope is None else scope.backend
    return os.environ.get(BACKEND_VARIABLE) or "auto" if backend == "auto" else backend


def choose_backend(backend: str, keys: Tensor) -> str:
    """Return the name of the backend that serves a cache; the log says once what `auto` took, and why.

    Args:
        backend: ``auto``, ``torch`` or the name of a registered backend.
        keys: keys as the cache holds them, `[..., D]`.

    Raises:
        UnsupportedError: the backend is unknown or cannot serve such a cache.
    """
    name = requested(backend)
    if name == "torch":
        return name
    if name != "auto":
        reason = _registered(name).refuses_cache(keys)
        if reason is not None:
            raise UnsupportedError(f"backend: {name} cannot be used, because {reason}.")
        return name
    if keys.device.type == "cpu":
        return _taken("torch", "the cache is on the CPU")
    why = "no other backend is registered"
    for candidate, entry in _all().items():
        reason = entry.refuses_cache(keys)
        if reason is None:
            return _taken(candidate, f"the cache is {keys.dtype} on {keys.device.type}")
        why = f"{candidate} cannot be used, because {reason}"
    return _taken("torch", why)


def dispatched(definition: Callable[P, R]) -> Callable[P, R]:
    """Let an operation, given by its plain-torch definition, run on the backend asked for.

    With ``auto`` a call that a backend refuses goes to torch; with a backend's name it raises UnsupportedError.
    Arguments of kvpolicy's own operations that do not fit together raise ValueError whatever the backend. The first
    argument of an operation is a tensor.

    Raises:
        ValueError: another module has an operation of this name, whose kernels would run instead.
    """
    op, home = definition.__name__, definition.__module__
    if _homes.setdefault(op, home) != home:
        raise ValueError(
            f"the operation {op} of {home} has the name of one of {_homes[op]}; begin it with the name of your package."
        )
    check: Callable[..., None] | None = getattr(arguments, op, None)

    @functools.wraps(definition)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if check is not None:
            check(*args, **kwargs)
        name = requested()
        if name != "torch":
            first: Any = args[0] if args else next(iter(kwargs.values()))
            # On the CPU `auto` is torch; a backend for CPUs is asked for by name.
            if name != "auto" or first.device.type != "cpu":
                chosen = _implementation(name, op, args, kwargs)
                if chosen is not None:
                    return chosen(*args, **kwargs)  # type: ignore[no-any-return]
        return definition(*args, **kwargs)

    return run


def _implementation(name: str, op: str, args: Any, kwargs: Any) -> Callable[..., Any] | None:
    if name != "auto":
        backend = _registered(name)
        function = backend.load(op)
        reason = backend.refuses(op, *args, **kwargs) if function is not None else None
        if reason is not None:
            raise UnsupportedError(f"backend: {name} cannot run {op}, because {reason}.")
        return function
    for candidate, backend in _all().items():
        function = backend.load(op)
        if function is None:
            continue
        reason = backend.refuses(op, *args, **kwargs)
        if reason is None:
            return function
        _say(f"backend: auto takes torch for {op}, because {candidate} cannot run it: {reason}.")
    return None


def backend_names() -> list[str]:
    """Return what the field `backend` of a policy may say: `BACKENDS` and the names of registered backends."""
    return list(dict.fromkeys((*BACKENDS, *_all())))


def _all() -> dict[str, Backend]:
    from kvpolicy.loading import installed

    return installed.catalog().backends()


def _registered(name: str) -> Backend:
    known = _all()
    if name not in known:
        names = ["auto", "torch", *sorted(known)]
        raise UnsupportedError(
            f"backend: {name!r} is not a registered backend, use one of {', '.join(names)}.{did_you_mean(name, names)}"
        )
    return known[name]


def _taken(name: str, why: str) -> str:
    _say(f"backend: auto takes {name}, because {why}.")
    return name


@functools.cache
def _say(message: str) -> None:
    """Log a message once per process."""
    _log.info("%s", message)
