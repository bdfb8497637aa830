"""From what a store and an attention call know of a layer to what components may see of it."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from kvpolicy.cache.queries.log import Window
from kvpolicy.cache.store import Rows, SlotTensors
from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.contracts.view import CacheView, Rope


@dataclass(frozen=True)
class LayerFacts:
    """What an attention call tells about its layer.

    Attributes:
        groups: query heads per KV head.
        scale: factor of the logits.
        softcap: logit soft-cap of the model, or None.
        attention_sinks: `[H, G]` sink logits, or None.
        output_projection: `[H, G, Dv, M]`, when a component needs the weights.
    """

    groups: int
    scale: float
    softcap: float | None = None
    attention_sinks: Tensor | None = None
    output_projection: Tensor | None = None


@dataclass(frozen=True)
class Observed:
    """The last queries of some rows.

    Attributes:
        queries: `[B, H, G, Q, D]`, rotated as the cached keys are.
        window: their positions and validity; of all rows.
        part: which rows these are.
    """

    queries: Tensor
    window: Window
    part: slice


def make_view(
    slots: SlotTensors,
    rows: Rows,
    facts: LayerFacts,
    *,
    layer: int,
    num_layers: int,
    rope: Rope | None,
    observed: Observed | None,
    extras: dict[str, Tensor],
    heads: HeadSpan | None = None,
) -> CacheView:
    """Return what components may see of one layer, for some rows.

    `rows.numbers` hold `prompt_length`, `seen`, `compaction` and, in a compaction, `budget`. One tensor of them serves
    all layers.
    """
    device = slots.keys.device
    numbers = rows.on(device)
    if facts.output_projection is not None:
        extras = {**extras, "output_projection": facts.output_projection}
    return CacheView(
        keys=slots.keys,
        values=slots.values,
        positions=slots.positions,
        valid=slots.valid,
        scale=facts.scale,
        layer_idx=layer,
        num_layers=num_layers,
        prompt_length=numbers["prompt_length"],
        seen=numbers["seen"],
        compaction=numbers["compaction"],
        queries=None if observed is None else observed.queries,
        query_positions=None if observed is None else observed.window.positions[observed.part].to(device),
        query_valid=None if observed is None else observed.window.valid[observed.part].to(device),
        state=MappingProxyType(dict(slots.state)),
        softcap=facts.softcap,
        attention_sinks=facts.attention_sinks,
        rope=rope,
        rope_positions=slots.rope_positions,
        budget=numbers.get("budget"),
        extras=MappingProxyType(extras),
        heads=heads,
        turned_back=numbers.get("turned_back"),
    )


def marked(by_position: Tensor, slots: SlotTensors) -> Tensor:
    """Look up marks by position, bool `[B, positions]`, for every slot; False for what lies behind them."""
    marks = by_position.to(slots.positions.device)
    last = marks.shape[1] - 1
    at = slots.positions.long().clamp(0, last)
    found = marks[:, None].expand(-1, at.shape[1], -1).gather(2, at)
    return found & slots.valid & (slots.positions <= last)
