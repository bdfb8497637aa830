"""Policies in transformers: `PolicyCache` for ``model.generate``, `ContextCache` for one context and many questions."""

from kvpolicy.runtimes.hf.answering import Reply
from kvpolicy.runtimes.hf.cache import PolicyCache
from kvpolicy.runtimes.hf.context import ContextCache
from kvpolicy.runtimes.hf.conversation import Conversation
from kvpolicy.runtimes.hf.generate import generate
from kvpolicy.runtimes.hf.stats import CacheStats, LayerStats

__all__ = ["CacheStats", "ContextCache", "Conversation", "LayerStats", "PolicyCache", "Reply", "generate"]
