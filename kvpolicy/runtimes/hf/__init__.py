"""Policies in transformers: `PolicyCache` for ``model.generate`` and a `generate` that also drives chunked prefill."""

from kvpolicy.runtimes.hf.cache import PolicyCache
from kvpolicy.runtimes.hf.generate import generate
from kvpolicy.runtimes.hf.stats import CacheStats, LayerStats

__all__ = ["CacheStats", "LayerStats", "PolicyCache", "generate"]
