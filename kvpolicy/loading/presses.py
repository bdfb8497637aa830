"""What kvpress's users write where a name of kvpolicy is asked for, and what stands there instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

PAGE: Final = "docs/from-kvpress.md"
"""Where all of them stand, with what differs."""

POLICIES: Final[Mapping[str, str]] = {
    "AdaKVPress": "adakv-snapkv",
    "CAMPress": "cam",
    "CURPress": "cur",
    "CapPress": "capkv",
    "ChunkKVPress": "chunkkv",
    "CompactorPress": "compactor",
    "CriticalKVPress": "criticalkv",
    "DMSPress": "threshold",
    "DuoAttentionPress": "duo-attention",
    "ExpectedAttentionPress": "expected-attention",
    "ExpectedAttentionStatsPress": "expected-attention",
    "FinchPress": "finch",
    "KVzapPress": "kvzap",
    "KeyDiffPress": "keydiff",
    "KnormPress": "knorm",
    "LUKVPress": "lu-kv",
    "LagKVPress": "lagkv",
    "ObservedAttentionPress": "h2o",
    "PyramidKVPress": "pyramidkv",
    "QFilterPress": "qfilter",
    "RandomPress": "random",
    "SnapKVPress": "snapkv-prefill",
    "StreamingLLMPress": "sinks-recent",
    "TOVAPress": "tova",
    "ThinKPress": "think",
}
"""The policy to take for each press."""

INSTEAD: Final[Mapping[str, str]] = {
    "BlockPress": "write `prefill_chunk: 1024` in a policy",
    "ChunkPress": "write `prefill_chunk: 1024` in a policy",
    "ComposedPress": "write one policy with the parts of both",
    "CriticalAdaKVPress": "take the policy 'defensivekv', which has output weights and budgets by head",
    "DecodingPress": "write `phase: decode` and a trigger such as `{every: 128}` in a policy",
    "KeyRerotationPress": "write `post: [rerotate]` in a policy",
    "LeverageScorePress": "write `importance: leverage` in a policy",
    "MergingPress": "write `post: [merge_values]` in a policy",
    "NonCausalAttnPress": "write `importance: non_causal` in a policy",
    "PerLayerCompressionPress": "write `allocator: pyramid`, or an allocator of your own, in a policy",
    "PrefillDecodingPress": "write `phase: both` in a policy",
}
"""What to do in place of a press that is no policy."""

NOTHING: Final = frozenset(
    {
        "FastKVzipPress",
        "KVComposePress",
        "KVgradPress",
        "KVzipPress",
        "RestoreKVPress",
        "SimLayerKVPress",
    }
)
"""Presses that nothing takes the place of."""


def lead(name: str) -> str:
    """Return a sentence that leads from a press to what takes its place; an empty text for what is no press.

    Args:
        name: what was asked for; ``snapkv_press`` and ``SnapKV`` are meant as ``SnapKVPress``.
    """
    press = _PLAIN.get(_plain(name))
    if press is None or (press in INSTEAD and not name.lower().endswith("press")):  # `decoding` is a word like others
        return ""
    if press in POLICIES:
        return f"For kvpress's {press} take the policy {POLICIES[press]!r} ({PAGE})."
    if press in INSTEAD:
        return f"For kvpress's {press} {INSTEAD[press]} ({PAGE})."
    return f"Nothing here takes the place of kvpress's {press} ({PAGE} says why)."


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").removesuffix("press")


_PLAIN: Final = {_plain(press): press for press in (*POLICIES, *INSTEAD, *NOTHING)}
