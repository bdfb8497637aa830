"""What transformers' generation loops know of a forward pass and do not tell the cache.

A pass of several tokens behind a cropped cache is a verification if assisted decoding runs it, and a new turn of the
prompt if anybody else does; a cache sees the same calls. Nor does it see that ``use_cache=False`` makes `generate` feed
the whole text at every step. The loops keep both in local variables, under the same names in all versions from 5.2, so
the stack is read: only for passes of several tokens and the first step after a prompt.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType

_LOOPS = frozenset({"_prefill", "_sample", "_beam_search", "_assisted_decoding"})


@dataclass(frozen=True)
class Loop:
    """The generation loop that a forward pass belongs to.

    Attributes:
        uses_cache: it feeds only what the cache has not seen.
        verifies: assisted decoding runs a pass over candidates, after the one that has the prompt.
        chunks: it feeds the prompt in chunks (``prefill_chunk_size``).
    """

    uses_cache: bool
    verifies: bool
    chunks: bool


def generation_loop() -> Loop | None:
    """Return the innermost generation loop of transformers that the running forward pass was called from, if any."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _LOOPS:
            known = frame.f_locals
            if isinstance(kwargs := known.get("model_kwargs"), dict):
                config = known.get("generation_config")
                return Loop(
                    uses_cache=kwargs.get("use_cache") is not False,
                    verifies=frame.f_code.co_name == "_assisted_decoding" and known.get("is_first_iteration") is False,
                    chunks=frame.f_code.co_name == "_prefill"
                    and getattr(config, "prefill_chunk_size", None) is not None,
                )
        frame = frame.f_back
    return None
