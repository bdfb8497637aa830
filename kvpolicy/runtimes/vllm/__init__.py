"""kvpolicy in vLLM: a plugin that serves a declared policy in a stock engine. Importing it does not import vLLM.

Start vLLM with ``--worker-cls kvpolicy.runtimes.vllm.Worker`` and ``--additional-config '{"kvpolicy": "rkv"}'``.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``, called in every process of vLLM.

    vLLM's attention backends are looked up through kvpolicy from now on, which gives vLLM's own back wherever no policy
    is set.
    """
    from kvpolicy.runtimes.vllm import backends, metrics

    backends.register()
    metrics.announce()


def __getattr__(name: str) -> Any:
    if name == "Worker":  # vLLM looks it up by this name
        if find_spec("vllm") is None:
            raise ImportError(f"{__name__} needs vllm; install it with: pip install 'kvpolicy[vllm]'.")
        from kvpolicy.runtimes.vllm.worker import worker_class

        return worker_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
