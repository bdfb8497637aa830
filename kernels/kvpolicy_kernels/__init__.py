"""Triton implementations of `kvpolicy.ops`, under the same names and signatures.

They enter as the backend ``triton``, through the same hook as anybody's. Importing this package never imports triton;
the first launch does.
"""

from __future__ import annotations

from kvpolicy.loading.hookspecs import RegisterBackend, hookimpl


@hookimpl
def kvpolicy_register_backends(register: RegisterBackend) -> None:
    """Register the kernels."""
    from kvpolicy_kernels.backend import TritonBackend

    register("triton", TritonBackend())
