"""Where the KV entries live. A store holds tensors and moves them; it decides nothing."""

from kvpolicy.cache.store.arena import DenseStore, Shape, SlotTensors
from kvpolicy.cache.store.ragged import BLOCK, Base, RaggedStore

__all__ = ["BLOCK", "Base", "DenseStore", "RaggedStore", "Shape", "SlotTensors"]
