"""The contract of a backend: another implementation of some operations of `kvpolicy.ops`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor


class Backend(ABC):
    """Implementations of some operations; a plugin registers one in the hook `kvpolicy_register_backends`."""

    @abstractmethod
    def load(self, op: str) -> Callable[..., Any] | None:
        """Return the function with the signature of `kvpolicy.ops.<op>`, or None to leave that operation to torch."""

    @abstractmethod
    def refuses_cache(self, keys: Tensor) -> str | None:
        """Say why caches like `keys` `[..., D]` cannot be served (a clause without a full stop), or return None."""

    @abstractmethod
    def refuses(self, op: str, /, *args: Any, **kwargs: Any) -> str | None:
        """Say why this call of an operation cannot be served (a clause without a full stop), or return None."""
