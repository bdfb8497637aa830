"""With which attention the tiny families run, and which are served, in the transformers that is installed."""

from __future__ import annotations

from transformers import DynamicCache

from kvpolicy.testing.tiny import tiny_model

_EAGER_ONLY = {"gpt_oss", "gemma2"}  # sdpa knows neither sinks nor, in transformers 5.2, soft-caps


def attentions(family: str) -> list[str]:
    """Return the implementations that compute all that a family asks for, eager first."""
    return ["eager"] if family in _EAGER_ONLY else ["eager", "sdpa"]


def served(family: str) -> bool:
    """Before transformers 5.3 or so, models with linear attention bring a cache of their own and are refused."""
    return family != "qwen3_next" or any(
        "Linear" in type(layer).__name__ for layer in DynamicCache(config=tiny_model(family).config).layers
    )
