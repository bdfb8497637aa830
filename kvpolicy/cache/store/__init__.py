"""Where the KV entries live. A store holds tensors and moves them; it decides nothing."""

from kvpolicy.cache.store.arena import ArenaStore
from kvpolicy.cache.store.protocol import Kept, Layout, RowId, Rows, SlotTensors, Store
from kvpolicy.cache.store.ragged import BLOCK, Base, RaggedStore, Repacked

__all__ = [
    "BLOCK",
    "ArenaStore",
    "Base",
    "Kept",
    "Layout",
    "RaggedStore",
    "Repacked",
    "RowId",
    "Rows",
    "SlotTensors",
    "Store",
]
