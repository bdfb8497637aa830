"""The mathematics of eviction in plain torch: the definition of right.

Scores are fp32 whatever the dtype of the cache, a slot outside its mask may hold anything (NaN and Inf included)
without reaching a result, and nothing of size slots x slots is ever built. Axes are those of `kvpolicy.types`.
"""

from kvpolicy.contracts.backend import Backend
from kvpolicy.ops.apportion import apportion, pooled_counts
from kvpolicy.ops.attention import attention_weights, masked_softmax
from kvpolicy.ops.compaction import compact
from kvpolicy.ops.density import key_density
from kvpolicy.ops.dispatch import choose_backend, dispatched, using_backend
from kvpolicy.ops.leverage import gaussian_sketch, leverage
from kvpolicy.ops.mean_key import head_redundancy, mean_key_similarity
from kvpolicy.ops.merging import merged_values
from kvpolicy.ops.noise import counter_uniform
from kvpolicy.ops.normalisation import (
    ROUNDING,
    by_maximum,
    extremes,
    from_lowest,
    lengths,
    levelled,
    mean_matched,
    min_max,
    places,
    ranks,
    z_scores,
)
from kvpolicy.ops.packing import pack, unpack
from kvpolicy.ops.projection import projected_value_norm
from kvpolicy.ops.ragged import Blocks, ragged_attention
from kvpolicy.ops.regions import numbered, ordered_by, quota_mask, ranks_in, region_sums
from kvpolicy.ops.rotary import mean_rotation, rotate, turn
from kvpolicy.ops.selection import top_k
from kvpolicy.ops.similarity import mean_similarity, redundancy
from kvpolicy.ops.window import smooth_scores, window_importance

__all__ = [
    "ROUNDING",
    "Backend",
    "Blocks",
    "apportion",
    "attention_weights",
    "by_maximum",
    "choose_backend",
    "compact",
    "counter_uniform",
    "dispatched",
    "extremes",
    "from_lowest",
    "gaussian_sketch",
    "head_redundancy",
    "key_density",
    "lengths",
    "levelled",
    "leverage",
    "masked_softmax",
    "mean_key_similarity",
    "mean_matched",
    "mean_rotation",
    "mean_similarity",
    "merged_values",
    "min_max",
    "numbered",
    "ordered_by",
    "pack",
    "places",
    "pooled_counts",
    "projected_value_norm",
    "quota_mask",
    "ragged_attention",
    "ranks",
    "ranks_in",
    "redundancy",
    "region_sums",
    "rotate",
    "smooth_scores",
    "top_k",
    "turn",
    "unpack",
    "using_backend",
    "window_importance",
    "z_scores",
]
