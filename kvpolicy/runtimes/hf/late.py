"""Masks of decode steps on an accelerator, compared without making the host wait for it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.errors import CacheStateError


class LateCheck:
    """Notices, one step late, that the mask of a decode step hides a token.

    Reading every step's mask would make the host wait for the device each time. So each mask is compared on the device
    with the one before it, and the result is read when the next step begins: by then it has long been there.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._hides: Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    def follows(self, mask: Tensor, seen: int) -> bool:
        """Whether a step's mask can be compared with the last one: both are of one batch, and nothing came between."""
        last = self._last
        return last is not None and last.shape == (mask.shape[0], seen) and last.device == mask.device

    def start(self, mask: Tensor, seen: int) -> None:
        """Note the mask `[B, seen + 1]` of a step that the host has read."""
        self._last = mask[:, : seen + 1].to(torch.bool)

    def compare(self, mask: Tensor, seen: int) -> None:
        """Compare the mask `[B, seen + 1]` of a step with the last one; `check` says what came of it."""
        assert self._last is not None
        mask = mask[:, : seen + 1].to(torch.bool)
        hides = (mask[:, :seen] != self._last).any() | ~mask[:, seen].all()
        self._last = mask
        if mask.device.type == "cuda":
            self._hides = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._hides.copy_(hides, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(mask.device))
        else:
            self._hides = hides

    def forget(self) -> None:
        """Have the host read the next step's mask: rows have moved, or tokens have been taken back."""
        self.check()
        self._last = None

    def check(self) -> None:
        """Raise CacheStateError if a step's mask hid a token; it stays an error until the cache is reset."""
        if self._hides is None:
            return
        if self._ready is not None:
            self._ready.synchronize()
        if bool(self._hides):
            raise CacheStateError(
                "attention_mask hides tokens at a decode step that were visible at the step before, which on an "
                "accelerator is noticed one step late, and that step attended to them; reset() the cache and give such "
                "a mask with the first step of a turn, and leave finished rows visible, as generate() does."
            )
        self._hides = self._ready = None
