"""The mathematics of eviction in plain torch: the definition of right.

Scores are fp32 whatever the dtype of the cache, a slot outside its mask may hold anything (NaN and Inf included)
without reaching a result, and nothing of size slots x slots is ever built. Axes are those of `kvpolicy.types`.
"""

from kvpolicy.ops.attention import attention_weights, masked_softmax
from kvpolicy.ops.compaction import compact
from kvpolicy.ops.dispatch import choose_backend
from kvpolicy.ops.noise import counter_uniform
from kvpolicy.ops.rotary import rotate
from kvpolicy.ops.selection import top_k
from kvpolicy.ops.similarity import mean_similarity, redundancy
from kvpolicy.ops.window import smooth_scores, window_importance

__all__ = [
    "attention_weights",
    "choose_backend",
    "compact",
    "counter_uniform",
    "masked_softmax",
    "mean_similarity",
    "redundancy",
    "rotate",
    "smooth_scores",
    "top_k",
    "window_importance",
]
