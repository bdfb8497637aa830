"""What happened to a cache: the input of the oracle. Plain tensors, nothing of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class LayerPass:
    """One layer in one forward pass.

    Attributes:
        keys: `[B, H, q, D]`, the new keys as the model made them.
        values: `[B, H, q, Dv]`.
        queries: `[B, Hq, q, D]`, as the model made them.
        held: `[row][head]`, original positions of the entries that the pass attended over, its own included.
        output: `[B, q, Hq, Dv]`, what the attention returned; None if it was not recorded.
        hidden: `[B, q, E]`, what the attention reads; None if no component asks.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor | None = None
    held: list[list[list[int]]] = field(default_factory=list)
    output: Tensor | None = None
    hidden: Tensor | None = None


@dataclass
class PassEvent:
    """One forward pass.

    Attributes:
        valid: bool `[B, q]`, False for padding.
        prefill: whether the pass belongs to a prompt.
        layers: the evictable layers by index.
    """

    valid: Tensor
    prefill: bool
    layers: dict[int, LayerPass] = field(default_factory=dict)


@dataclass
class Settled:
    """Due compactions have been run, as one more token would; `held[layer][row][head]` are the positions left."""

    held: dict[int, list[list[list[int]]]]


@dataclass
class Crop:
    """The last `columns` columns, padding included, were taken back."""

    columns: int


@dataclass
class RowsTaken:
    """Rows were reordered, repeated or selected: new row `i` is the old row `index[i]`."""

    index: list[int]


Event = PassEvent | Settled | Crop | RowsTaken


@dataclass
class LayerInfo:
    """What a layer's attention says about itself.

    Attributes:
        heads, groups: KV heads, and query heads per KV head.
        scale: factor of the logits.
        softcap: logit soft-cap or None.
        attention_sinks: `[H, G]` sink logits or None.
        inv_freq: radians per position of each rotated pair, or None when unknown.
        interleaved: whether neighbours are rotated (else dimension `i` with `i + R/2`).
        output_projection: `[H, G, Dv, M]`, the rows of the output projection that each query head meets, or None.
    """

    heads: int
    groups: int
    scale: float
    softcap: float | None = None
    attention_sinks: Tensor | None = None
    inv_freq: Tensor | None = None
    interleaved: bool = False
    output_projection: Tensor | None = None


@dataclass
class Trace:
    """Everything that happened to a cache since it was made or reset.

    Attributes:
        events: in order.
        layers: the evictable layers by index.
        num_layers: layers of the whole model.
    """

    num_layers: int
    events: list[Event] = field(default_factory=list)
    layers: dict[int, LayerInfo] = field(default_factory=dict)

    @property
    def passes(self) -> list[PassEvent]:
        """The forward passes."""
        return [event for event in self.events if isinstance(event, PassEvent)]
