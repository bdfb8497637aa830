"""Where the KV entries live. A store holds tensors and moves them; it decides nothing."""

from kvpolicy.stores.dense import DenseStore, Shape

__all__ = ["DenseStore", "Shape"]
