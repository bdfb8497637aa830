"""The bundled components; they enter by the same door as anybody's, an entry point of the group ``kvpolicy``."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from kvpolicy.loading.hookspecs import RegisterComponent, hookimpl

COMPONENTS = (
    "allocators.adaptive_heads:AdaptiveHeads",
    "allocators.global_pool:GlobalPool",
    "allocators.pyramid:Pyramid",
    "allocators.table:TableShares",
    "allocators.table_curve:TableCurve",
    "allocators.table_gate:TableGate",
    "allocators.uniform:Uniform",
    "importance.accumulated_attention:AccumulatedAttention",
    "importance.attention_memory:AttentionMemory",
    "importance.beacon_attention:BeaconAttention",
    "importance.critical:Critical",
    "importance.cur:Cur",
    "importance.decayed_attention:DecayedAttention",
    "importance.delayed:Delayed",
    "importance.expected_attention:ExpectedAttention",
    "importance.greedy_values:GreedyValues",
    "importance.key_diff:KeyDiff",
    "importance.key_norm:KeyNorm",
    "importance.lag_relative:LagRelative",
    "importance.last_used:LastUsed",
    "importance.learned_gate:LearnedGate",
    "importance.leverage:Leverage",
    "importance.non_causal:NonCausal",
    "importance.none:NoImportance",
    "importance.optimal_brain:OptimalBrain",
    "importance.output_error:OutputError",
    "importance.output_weighted:OutputWeighted",
    "importance.q_filter:QFilter",
    "importance.random:Random",
    "importance.recency:Recency",
    "importance.recurrence:Recurrence",
    "importance.tova:Tova",
    "importance.trigonometric:Trigonometric",
    "importance.value_capacity:ValueCapacity",
    "importance.value_norm:ValueNorm",
    "importance.value_weighted:ValueWeighted",
    "importance.window_attention:WindowAttention",
    "importance.worst_case:WorstCase",
    "mixers.attention_mass:AttentionMass",
    "mixers.head_adaptive:HeadAdaptive",
    "mixers.importance_only:ImportanceOnly",
    "mixers.linear:Linear",
    "mixers.max_normalised:MaxNormalised",
    "mixers.rank:Rank",
    "mixers.z_score:ZScore",
    "post.merge_values:MergeValues",
    "post.prune_channels:PruneChannels",
    "post.rerotate:Rerotate",
    "protections.large_values:LargeValues",
    "protections.pads:Pads",
    "protections.prompt:Prompt",
    "protections.recent:Recent",
    "protections.sinks:Sinks",
    "redundancy.key_cosine:KeyCosine",
    "redundancy.key_coverage:KeyCoverage",
    "redundancy.key_density:KeyDensity",
    "redundancy.mean_key:MeanKey",
    "redundancy.negative:Negative",
    "redundancy.none:NoRedundancy",
    "selectors.chunks:Chunks",
    "selectors.per_chunk_quota:PerChunkQuota",
    "selectors.region_quota:RegionQuota",
    "selectors.representatives:Representatives",
    "selectors.stochastic:Stochastic",
    "selectors.threshold:Threshold",
    "selectors.top_k:TopK",
    "triggers.each_step:EachStep",
    "triggers.every:Every",
)
"""Module and class of each; a component is called as its module."""


@hookimpl
def kvpolicy_register_components(register: RegisterComponent) -> None:
    """Register every bundled component; the bridge to kvpress only where there is a kvpress."""
    bridges = ("importance.kvpress:KVPress",) if find_spec("kvpress") is not None else ()
    for line in (*COMPONENTS, *bridges):
        module, _, name = line.partition(":")
        register(module.rpartition(".")[2], getattr(import_module(f"{__name__}.{module}"), name))
