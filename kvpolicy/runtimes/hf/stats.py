"""What a cache holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from kvpolicy.cache.engine import Engine
from kvpolicy.errors import CacheStateError
from kvpolicy.html_text import facts, size


@dataclass(frozen=True)
class LayerStats:
    """One evictable layer. Entries are per KV head and, where rows differ, those of the row that has most.

    Under a policy that gives heads or layers different counts they are means over all heads and layers, rounded up;
    `PolicyCache.kept` lists what each head holds.

    Attributes:
        layer_idx: index as transformers counts.
        seen: tokens seen.
        resident: entries held now.
        peak_resident: most entries ever held.
        evicted: entries dropped.
        compactions: how often the row was compacted.
        bytes_resident: bytes of all rows' and heads' keys and values that are held.
        bytes_peak: bytes of the most that each row ever held; a row that was read alone and repeated counts repeated.
        bytes_allocated: bytes of the tensors that hold them.
        bytes_metadata: bytes of positions and slot state, as allocated.
    """

    layer_idx: int
    seen: int
    resident: int
    peak_resident: int
    evicted: int
    compactions: int
    bytes_resident: int
    bytes_peak: int
    bytes_allocated: int
    bytes_metadata: int


@dataclass(frozen=True)
class CacheStats:
    """All evictable layers; the totals of entries are maxima over layers, those of bytes are sums."""

    layers: list[LayerStats]

    def __repr__(self) -> str:
        return (
            f"CacheStats({len(self.layers)} layers, seen {self.seen:,}, resident {self.resident:,} (peak "
            f"{self.peak_resident:,}), {self.compactions:,} compactions, {size(self.bytes_resident)} held)"
        )

    def _repr_html_(self) -> str:
        allocated, beside = size(self.bytes_allocated), size(self.bytes_metadata)
        return facts(
            "Cache",
            [
                ("layers", len(self.layers)),
                ("tokens seen", f"{self.seen:,}"),
                ("entries per KV head", f"{self.resident:,} now, {self.peak_resident:,} at the peak"),
                ("evicted", f"{self.evicted:,} in {self.compactions:,} compactions"),
                ("keys and values", f"{size(self.bytes_resident)} held, {allocated} allocated"),
                ("positions, slot state", beside),
            ],
        )

    def _most(self, name: str) -> int:
        return max((getattr(layer, name) for layer in self.layers), default=0)

    def _sum(self, name: str) -> int:
        return sum(getattr(layer, name) for layer in self.layers)

    @property
    def seen(self) -> int:
        """Tokens seen by the longest row."""
        return self._most("seen")

    @property
    def resident(self) -> int:
        """Entries per KV head held now, in the longest row."""
        return self._most("resident")

    @property
    def peak_resident(self) -> int:
        """Most entries per KV head ever held."""
        return self._most("peak_resident")

    @property
    def evicted(self) -> int:
        """Entries per KV head dropped."""
        return self._most("evicted")

    @property
    def compactions(self) -> int:
        """Compactions of the row that had most."""
        return self._most("compactions")

    @property
    def bytes_resident(self) -> int:
        """Bytes of the keys and values that are held."""
        return self._sum("bytes_resident")

    @property
    def bytes_peak(self) -> int:
        """Bytes of keys and values of the most that each row ever held."""
        return self._sum("bytes_peak")

    @property
    def bytes_allocated(self) -> int:
        """Bytes of the key and value tensors."""
        return self._sum("bytes_allocated")

    @property
    def bytes_metadata(self) -> int:
        """Bytes of positions and slot state."""
        return self._sum("bytes_metadata")


def collect(engine: Engine) -> CacheStats:
    """Read the numbers off an engine."""
    layers = []
    for layer in engine.layers:
        store = engine.stores.get(layer)
        rows = engine.rows
        held, most, data, metadata = 0, 0, 0, 0
        if store is not None:
            held = store.layout.bytes_per_entry * sum(store.entries(layer, engine.held(slice(None)).lengths))
            most = store.layout.bytes_per_entry * store.layout.heads * sum(row.peak for row in rows)
            data, metadata = store.bytes_allocated(layer)
        layers.append(
            LayerStats(
                layer_idx=layer,
                seen=max((r.seen for r in rows), default=0),
                resident=max((r.resident for r in rows), default=0),
                peak_resident=max((r.peak for r in rows), default=0),
                evicted=max((r.seen - r.resident for r in rows), default=0),
                compactions=max((r.compactions for r in rows), default=0),
                bytes_resident=held,
                bytes_peak=most,
                bytes_allocated=data,
                bytes_metadata=metadata,
            )
        )
    return CacheStats(layers)


def positions_of(engine: Engine, layer: int, head: int, row: int) -> list[int]:
    """Return the original positions that a head holds; see `PolicyCache.kept`."""
    store = engine.stores.get(layer)
    if store is None or not 0 <= row < len(engine.rows) or not 0 <= head < store.layout.heads:
        raise CacheStateError(
            f"kept: there is no layer {layer}, head {head}, row {row}; the policy works on layers {engine.layers} and "
            f"the cache holds {len(engine.rows)} rows."
        )
    slots = store.read(layer, engine.held(slice(row, row + 1)))
    positions: list[int] = slots.positions[0, head][slots.valid[0, head]].tolist()
    return positions
