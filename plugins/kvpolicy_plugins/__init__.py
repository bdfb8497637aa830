"""The bundled components; they enter by the same door as anybody's, an entry point of the group ``kvpolicy``."""

from __future__ import annotations

from importlib.util import find_spec

from kvpolicy.loading.hookspecs import RegisterComponent, hookimpl


@hookimpl
def kvpolicy_register_components(register: RegisterComponent) -> None:  # noqa: PLR0915 - a list
    """Register every bundled component."""
    from kvpolicy_plugins.allocators.adaptive_heads import AdaptiveHeads
    from kvpolicy_plugins.allocators.global_pool import GlobalPool
    from kvpolicy_plugins.allocators.pyramid import Pyramid
    from kvpolicy_plugins.allocators.table import TableShares
    from kvpolicy_plugins.allocators.table_curve import TableCurve
    from kvpolicy_plugins.allocators.table_gate import TableGate
    from kvpolicy_plugins.allocators.uniform import Uniform
    from kvpolicy_plugins.importance.accumulated_attention import AccumulatedAttention
    from kvpolicy_plugins.importance.attention_memory import AttentionMemory
    from kvpolicy_plugins.importance.critical import Critical
    from kvpolicy_plugins.importance.cur import Cur
    from kvpolicy_plugins.importance.decayed_attention import DecayedAttention
    from kvpolicy_plugins.importance.expected_attention import ExpectedAttention
    from kvpolicy_plugins.importance.key_diff import KeyDiff
    from kvpolicy_plugins.importance.key_norm import KeyNorm
    from kvpolicy_plugins.importance.kvpress_adapter import KVPress
    from kvpolicy_plugins.importance.lag_relative import LagRelative
    from kvpolicy_plugins.importance.last_used import LastUsed
    from kvpolicy_plugins.importance.leverage import Leverage
    from kvpolicy_plugins.importance.non_causal import NonCausal
    from kvpolicy_plugins.importance.none import NoImportance
    from kvpolicy_plugins.importance.q_filter import QFilter
    from kvpolicy_plugins.importance.random import Random
    from kvpolicy_plugins.importance.recency import Recency
    from kvpolicy_plugins.importance.recurrence import Recurrence
    from kvpolicy_plugins.importance.tova import Tova
    from kvpolicy_plugins.importance.trigonometric import Trigonometric
    from kvpolicy_plugins.importance.value_norm import ValueNorm
    from kvpolicy_plugins.importance.value_weighted import ValueWeighted
    from kvpolicy_plugins.importance.window_attention import WindowAttention
    from kvpolicy_plugins.mixers.head_adaptive import HeadAdaptive
    from kvpolicy_plugins.mixers.importance_only import ImportanceOnly
    from kvpolicy_plugins.mixers.linear import Linear
    from kvpolicy_plugins.mixers.max_normalised import MaxNormalised
    from kvpolicy_plugins.mixers.rank import Rank
    from kvpolicy_plugins.mixers.z_score import ZScore
    from kvpolicy_plugins.post.merge_values import MergeValues
    from kvpolicy_plugins.post.prune_channels import PruneChannels
    from kvpolicy_plugins.post.rerotate import Rerotate
    from kvpolicy_plugins.protections.pads import Pads
    from kvpolicy_plugins.protections.prompt import Prompt
    from kvpolicy_plugins.protections.recent import Recent
    from kvpolicy_plugins.protections.sinks import Sinks
    from kvpolicy_plugins.redundancy.key_cosine import KeyCosine
    from kvpolicy_plugins.redundancy.key_coverage import KeyCoverage
    from kvpolicy_plugins.redundancy.key_density import KeyDensity
    from kvpolicy_plugins.redundancy.mean_key import MeanKey
    from kvpolicy_plugins.redundancy.negative import Negative
    from kvpolicy_plugins.redundancy.none import NoRedundancy
    from kvpolicy_plugins.selectors.chunks import Chunks
    from kvpolicy_plugins.selectors.per_chunk_quota import PerChunkQuota
    from kvpolicy_plugins.selectors.region_quota import RegionQuota
    from kvpolicy_plugins.selectors.stochastic import Stochastic
    from kvpolicy_plugins.selectors.threshold import Threshold
    from kvpolicy_plugins.selectors.top_k import TopK
    from kvpolicy_plugins.triggers.each_step import EachStep
    from kvpolicy_plugins.triggers.every import Every

    register("accumulated_attention", AccumulatedAttention)
    register("attention_memory", AttentionMemory)
    register("critical", Critical)
    register("cur", Cur)
    register("decayed_attention", DecayedAttention)
    register("expected_attention", ExpectedAttention)
    register("key_diff", KeyDiff)
    register("key_norm", KeyNorm)
    if find_spec("kvpress") is not None:
        register("kvpress", KVPress)
    register("lag_relative", LagRelative)
    register("last_used", LastUsed)
    register("leverage", Leverage)
    register("non_causal", NonCausal)
    register("none", NoImportance)
    register("q_filter", QFilter)
    register("random", Random)
    register("recency", Recency)
    register("recurrence", Recurrence)
    register("tova", Tova)
    register("trigonometric", Trigonometric)
    register("value_norm", ValueNorm)
    register("value_weighted", ValueWeighted)
    register("window_attention", WindowAttention)

    register("key_cosine", KeyCosine)
    register("key_coverage", KeyCoverage)
    register("key_density", KeyDensity)
    register("mean_key", MeanKey)
    register("negative", Negative)
    register("none", NoRedundancy)

    register("head_adaptive", HeadAdaptive)
    register("importance_only", ImportanceOnly)
    register("linear", Linear)
    register("max_normalised", MaxNormalised)
    register("rank", Rank)
    register("z_score", ZScore)

    register("adaptive_heads", AdaptiveHeads)
    register("global_pool", GlobalPool)
    register("pyramid", Pyramid)
    register("table", TableShares)
    register("table_curve", TableCurve)
    register("table_gate", TableGate)
    register("uniform", Uniform)

    register("chunks", Chunks)
    register("per_chunk_quota", PerChunkQuota)
    register("region_quota", RegionQuota)
    register("stochastic", Stochastic)
    register("threshold", Threshold)
    register("top_k", TopK)

    register("pads", Pads)
    register("prompt", Prompt)
    register("recent", Recent)
    register("sinks", Sinks)

    register("each_step", EachStep)
    register("every", Every)

    register("merge_values", MergeValues)
    register("prune_channels", PruneChannels)
    register("rerotate", Rerotate)
