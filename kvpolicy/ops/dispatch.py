"""Which implementation of the operations is used."""

from __future__ import annotations

from typing import Literal

from kvpolicy.errors import UnsupportedError, did_you_mean

BACKENDS = ("auto", "torch", "triton")
"""What the field `backend` of a policy may say."""


def choose_backend(backend: str) -> Literal["torch"]:
    """Return the backend that `backend` stands for.

    Args:
        backend: ``auto``, ``torch`` or ``triton``.

    Raises:
        UnsupportedError: the backend is unknown or cannot run here.
    """
    if backend in ("auto", "torch"):
        return "torch"
    if backend == "triton":
        raise UnsupportedError("backend: no Triton kernels are installed in this version, use backend: torch.")
    raise UnsupportedError(
        f"backend: {backend!r} is not a backend, use one of {', '.join(BACKENDS)}.{did_you_mean(backend, BACKENDS)}"
    )
