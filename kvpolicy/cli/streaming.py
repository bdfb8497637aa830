"""Shows text while it is generated, with a line of progress below it on a terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from transformers import TextStreamer

if TYPE_CHECKING:
    from torch import Tensor

_REFRESH_SECONDS = 0.25


class _HasStats(Protocol):
    def stats(self) -> Any:
        """Return numbers with `resident` and `evicted`."""


class TextStream(TextStreamer):
    """A streamer for ``model.generate`` that writes to a console.

    Args:
        tokenizer: turns tokens into text.
        console: where the text goes; without a terminal it gets the bare text.
        cache: what the progress line reads its numbers from.
    """

    def __init__(self, tokenizer: Any, console: Console, cache: _HasStats) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens = 0
        self._console = console
        self._cache = cache
        self._line = ""
        self._started = time.perf_counter()
        self._next_refresh = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self._line:
            self._print(self._line)
            self._line = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt (first call) or the newest token."""
        if not self.next_tokens_are_prompt:
            self.tokens += value.numel()
        super().put(value)
        if self._live is not None and time.perf_counter() >= self._next_refresh:
            self._refresh()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take text that will not change any more."""
        if self._live is None:
            self._console.file.write(text)
            self._console.file.flush()
            return
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._print(line)
        # A line that is full moves above the live region, which then stays one line high.
        while len(self._line) > self._console.width - 1:
            cut = self._line.rfind(" ", 1, self._console.width - 1)
            cut = cut if cut > 0 else self._console.width - 1
            self._print(self._line[:cut])
            self._line = self._line[cut:].lstrip(" ")

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def _refresh(self) -> None:
        now = time.perf_counter()
        self._next_refresh = now + _REFRESH_SECONDS
        stats = self._cache.stats()
        rate = self.tokens / max(now - self._started, 1e-9)
        status = (
            f"{self.tokens} tokens · {rate:.1f} tokens/s · {stats.resident} entries resident · {stats.evicted} evicted"
        )
        assert self._live is not None
        self._live.update(Group(Text(self._line), Text(status, style="dim")), refresh=True)
