"""Caches that decode the same tokens side by side, and what each token cost."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import kvpolicy
from kvbench.measuring import Sample, timed
from kvbench.real import real_tokens
from kvpolicy import Policy
from kvpolicy.runtimes.hf import PolicyCache
from kvpolicy.runtimes.hf.model_facts import head_shapes

PROMPT = 32
"""Tokens of every prompt: what is measured is decoding."""
PIECE = 64
"""Tokens given at once between two timed blocks."""
TURN = 16
"""Tokens that one lane decodes before the next one has its turn."""


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """As many entries as its first forward pass brings; each new token overwrites the oldest, in place."""

    seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values `[B, H, q, D]`; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states.clone(), value_states.clone()
        else:
            slot = self.seen % self.keys.shape[2]
            places = self.keys.narrow(2, slot, 1), self.values.narrow(2, slot, 1)
            torch._foreach_copy_(places, (key_states, value_states))
        self.seen += key_states.shape[2]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the tokens seen, from which the model takes positions."""
        return self.seen


@dataclass(frozen=True)
class Token:
    """One decoded token of every row: its position, and what it took."""

    position: int
    time: Sample


class Lane:
    """One cache, and what decoding with it cost.

    Args:
        name: for the tables.
        model: the model.
        cache: the cache of the rows that are given every token.
        copies: rows that a timed block has for each of these. With more than one, blocks are decoded in copies of the
            cache that are thrown away: then only one row pays for the tokens between two blocks.

    Attributes:
        tokens: what was timed.
        peak_bytes: most bytes of keys, values and what goes with them, as allocated during timed blocks.
    """

    def __init__(self, name: str, model: PreTrainedModel, cache: Cache, copies: int = 1) -> None:
        self.name, self.model, self.cache, self.copies = name, model, cache, copies
        self.tokens: list[Token] = []
        self.peak_bytes = 0
        self._block = cache

    def prefill(self, tokens: Tensor) -> None:
        """Give the model its prompt `[B, T]`."""
        self.model(tokens, past_key_values=self.cache, logits_to_keep=1)

    def feed(self, tokens: Tensor) -> None:
        """Give the model tokens `[B, T]` in pieces, untimed."""
        for piece in tokens.split(PIECE, 1) if tokens.shape[1] else ():
            if isinstance(self.cache, PolicyCache):
                self.cache.crop(0)  # what follows is a step of several tokens, not a new turn
            self.model(piece, past_key_values=self.cache, logits_to_keep=1)

    def open_block(self) -> None:
        """Prepare to decode a block."""
        if self.copies > 1:
            mine = self.cache
            self._block = mine.fork() if isinstance(mine, PolicyCache) else copy.deepcopy(mine)
            self._block.batch_repeat_interleave(self.copies)

    def decode(self, tokens: Tensor, position: int) -> None:
        """Decode tokens `[B, T]` one by one, timed, in all copies; the first one is at `position`."""
        cache = self._block
        for offset in range(tokens.shape[1]):
            token = tokens[:, offset : offset + 1].repeat_interleave(self.copies, 0)
            taken = timed(lambda token=token: self.model(token, past_key_values=cache))  # type: ignore[misc]
            self.tokens.append(Token(position + offset, taken))
        self.peak_bytes = max(self.peak_bytes, allocated_bytes(cache))

    def close_block(self, tokens: Tensor, few: int) -> None:
        """Bring the rows that go on to the end of a block `[B, T]`, of which `few` tokens were decoded."""
        if self.copies > 1:
            if isinstance(self._block, PolicyCache):
                self._block.close()
            self._block = self.cache
            few = 0
        self.feed(tokens[:, few:])

    def between(self, start: int, stop: int) -> list[Sample]:
        """Return the times of the tokens at these positions."""
        return [token.time for token in self.tokens if start <= token.position < stop]


class PreallocatedLane(Lane):
    """A cache that holds `entries` entries all the time and decides nothing: at its size no policy can be faster."""

    def __init__(self, name: str, model: PreTrainedModel, entries: int, copies: int = 1) -> None:
        layers = len(DynamicCache(config=model.config).layers)
        super().__init__(name, model, Cache(layers=[PreallocatedLayer() for _ in range(layers)]), copies)
        self.entries = entries

    def prefill(self, tokens: Tensor) -> None:
        """Fill all entries of all copies of the rows, with any text: time does not depend on it."""
        super().prefill(real_tokens(self.entries) % self.model.config.vocab_size)
        self.cache.batch_repeat_interleave(tokens.shape[0] * self.copies)

    def feed(self, tokens: Tensor) -> None:
        """Do nothing, here and below: the cache is as full as it will ever be."""

    def open_block(self) -> None:
        """See `feed`."""

    def close_block(self, tokens: Tensor, few: int) -> None:
        """See `feed`."""


def allocated_bytes(cache: Cache) -> int:
    """Return the bytes of a cache's tensors, positions and the like included."""
    if isinstance(cache, PolicyCache):
        stats = cache.stats()
        return stats.bytes_allocated + stats.bytes_metadata
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def decode_block(lanes: Sequence[Lane], tokens: Tensor, start: int, stop: int, few: Mapping[str, int]) -> None:
    """Decode the tokens at `start` to `stop` in every lane, some tokens of each in turn.

    Args:
        lanes: they have been given everything before `start`.
        tokens: `[B, T]`, the rows that are given every token.
        start, stop: the block.
        few: by lane, how many tokens at the block's beginning are decoded and timed; the others are given in pieces.
    """
    ends = {lane.name: min(stop, start + few.get(lane.name, stop - start)) for lane in lanes}
    for lane in lanes:
        lane.open_block()
    for number, first in enumerate(range(start, stop, TURN)):
        for lane in lanes if number % 2 else lanes[::-1]:
            lane.decode(tokens[:, first : min(first + TURN, ends[lane.name])], first)
    for lane in lanes:
        lane.close_block(tokens[:, start:stop], ends[lane.name] - start)


def integrated(points: list[tuple[float, float]], start: int, stop: int) -> float:
    """Return the seconds of all tokens from `start` to `stop`: linear between points, constant outside of them.

    Args:
        points: (position, seconds per token), by position.
        start, stop: positions.
    """
    before, after = (float(start), points[0][1]), (float(stop), points[-1][1])
    path = [before, *points, after]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(path))


def rows_of_text(count: int, rows: int, model: PreTrainedModel) -> Tensor:
    """Return int64 `[rows, count]`: the project's own text, begun at another place in every row."""
    text = real_tokens(count + PIECE * (rows - 1))[0] % model.config.vocab_size
    return torch.stack([text[PIECE * row : PIECE * row + count] for row in range(rows)])


def interval_of(policy: Policy) -> int:
    """Return how many tokens a full cache takes between two compactions."""
    return policy.trigger.buffer()


def policy_with(name: str, entries: int, interval: int | None = None) -> Policy:
    """Return a policy that keeps `entries` entries per head, compacted every `interval` tokens or as it says itself."""
    changes = {} if interval is None else {"trigger": {"every": interval}}
    return kvpolicy.load(name, budget=entries, **changes).build()


def entry_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of one entry of one row: a key and a value of every KV head of every layer."""
    layers = range(len(DynamicCache(config=model.config).layers))
    return int(2 * model.dtype.itemsize * sum(heads * dim for heads, dim in head_shapes(model, layers)))
