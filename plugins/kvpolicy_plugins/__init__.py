"""The bundled components; they enter by the same door as anybody's, an entry point of the group ``kvpolicy``."""

from __future__ import annotations

from kvpolicy.hookspecs import RegisterComponent, hookimpl


@hookimpl
def kvpolicy_register_components(register: RegisterComponent) -> None:
    """Register every bundled component."""
    from kvpolicy_plugins.allocators.uniform import Uniform
    from kvpolicy_plugins.importance.accumulated_attention import AccumulatedAttention
    from kvpolicy_plugins.importance.key_norm import KeyNorm
    from kvpolicy_plugins.importance.none import NoImportance
    from kvpolicy_plugins.importance.random import Random
    from kvpolicy_plugins.importance.recency import Recency
    from kvpolicy_plugins.importance.value_norm import ValueNorm
    from kvpolicy_plugins.importance.window_attention import WindowAttention
    from kvpolicy_plugins.mixers.importance_only import ImportanceOnly
    from kvpolicy_plugins.mixers.linear import Linear
    from kvpolicy_plugins.post.rerotate import Rerotate
    from kvpolicy_plugins.protections.pads import Pads
    from kvpolicy_plugins.protections.prompt import Prompt
    from kvpolicy_plugins.protections.recent import Recent
    from kvpolicy_plugins.protections.sinks import Sinks
    from kvpolicy_plugins.redundancy.key_cosine import KeyCosine
    from kvpolicy_plugins.redundancy.none import NoRedundancy
    from kvpolicy_plugins.selectors.top_k import TopK
    from kvpolicy_plugins.triggers.each_step import EachStep
    from kvpolicy_plugins.triggers.every import Every

    register("accumulated_attention", AccumulatedAttention)
    register("key_norm", KeyNorm)
    register("none", NoImportance)
    register("random", Random)
    register("recency", Recency)
    register("value_norm", ValueNorm)
    register("window_attention", WindowAttention)

    register("key_cosine", KeyCosine)
    register("none", NoRedundancy)

    register("importance_only", ImportanceOnly)
    register("linear", Linear)

    register("uniform", Uniform)

    register("top_k", TopK)

    register("pads", Pads)
    register("prompt", Prompt)
    register("recent", Recent)
    register("sinks", Sinks)

    register("each_step", EachStep)
    register("every", Every)

    register("rerotate", Rerotate)
