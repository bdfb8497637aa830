"""What is fed to components query by query: attention weights, the queries themselves, and their statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from kvpolicy import ops
from kvpolicy.cache.queries.statistics import QueryStatistics
from kvpolicy.contracts.view import CacheView, Rope
from kvpolicy.policy import checks
from kvpolicy.policy.policy import Policy

_BLOCK = 32  # queries per call of `observe_attention`: bounds the weights to [B, H, G, 32, N]


class Observation:
    """The components of a policy that accumulate something over all queries, and the statistics of queries.

    Attributes:
        active: whether queries must be fed at all.
        statistics: layer -> statistics of its queries.
    """

    def __init__(self, policy: Policy, ropes: Mapping[int, Rope]) -> None:
        self._attention: list[Any] = [c for c in policy.components if "attention" in c.needs]
        self._stream: list[Any] = [c for c in policy.components if "query_stream" in c.needs]
        self._counts = "query_statistics" in policy.needs
        self._ropes = ropes
        self.statistics: dict[int, QueryStatistics] = {}
        self.active = bool(self._attention or self._stream or self._counts)

    def feed(
        self,
        layer: int,
        queries: Tensor,
        turned: Tensor,
        positions: Tensor,
        valid: Tensor,
        view: Callable[[], CacheView],
        write: Callable[[str, Tensor], None],
    ) -> None:
        """Feed some queries of a layer to everything that wants them.

        Args:
            layer: index of the layer.
            queries: `[B, H, G, Q, D]` as the model made them.
            turned: the same, rotated as the cached keys are.
            positions: int32 `[B, Q]`, original positions.
            valid: bool `[B, Q]`.
            view: makes a view of the whole layer, with its present slot state.
            write: replaces slot state by name, `[B, H, N]`.
        """
        if self._counts:
            if layer not in self.statistics:
                self.statistics[layer] = QueryStatistics.empty(queries)
            self.statistics[layer].add(queries, positions, valid, self._ropes[layer])
        if not (self._attention or self._stream):
            return
        for start in range(0, queries.shape[3], _BLOCK):
            block = slice(start, start + _BLOCK)
            some, where, real = turned[:, :, :, block], positions[:, block], valid[:, block]
            seen = replace(view(), query_positions=where, query_valid=real)
            for component in self._stream:
                new = component.observe_queries(seen, some, where, real)
                for name, tensor in checks.state(new, seen, component).items():
                    write(name, tensor)
            if not self._attention:
                continue
            if self._stream:  # which may have changed the slot state
                seen = replace(view(), query_positions=where, query_valid=real)
            weights = ops.attention_weights(
                some, where, real, seen.keys, seen.positions, seen.valid,
                scale=seen.scale, softcap=seen.softcap, attention_sinks=seen.attention_sinks,
            )  # fmt: skip
            for component in self._attention:
                new = component.observe_attention(seen, weights)
                for name, tensor in checks.state(new, seen, component).items():
                    write(name, tensor)

    def extras(self, layer: int, rows: slice) -> dict[str, Tensor]:
        """Return the statistics of a layer for a view."""
        found = self.statistics.get(layer)
        return {} if found is None else found.extras(rows)

    def take(self, index: Tensor) -> None:
        """Reorder, repeat or select batch rows; `index` int64 `[B']`."""
        self.statistics = {layer: each.take(index) for layer, each in self.statistics.items()}

    def clone(self, batch: Tensor) -> Observation:
        """Return an independent copy; `batch` is int64 `0 ... B-1`."""
        twin = object.__new__(Observation)
        twin.__dict__.update(self.__dict__)
        twin.take(batch)
        return twin
