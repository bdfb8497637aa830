"""What a component may look at: a read-only picture of one layer's cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, overload

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from kvpolicy.contracts.heads import HeadSpan
from kvpolicy.errors import UnsupportedError
from kvpolicy.types import Keys, Lengths, Mask, Positions, Queries, Values

_EMPTY: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a layer, for components that turn keys back or forward.

    Attributes:
        inv_freq: fp32 `[R/2]`, radians per position of each rotated pair; `R <= D` dimensions are rotated.
        interleaved: False for the "rotate half" layout (dimension `i` pairs with `i + R/2`), True for neighbours.
    """

    inv_freq: Float[Tensor, " half"]
    interleaved: bool = False


@dataclass(frozen=True)
class CacheView:
    """All that a component may see of one layer. Nothing in it may be written to.

    Slots are in order of position. A slot that is not `valid` (padding, free tail) may hold anything, NaN included.

    Attributes:
        keys: `[B, H, N, D]`, after RoPE, in the cache's dtype.
        values: `[B, H, N, Dv]`, in the cache's dtype.
        positions: int32 `[B, H, N]`, original positions.
        valid: bool `[B, H, N]`.
        queries: `[B, H, G, Q, D]`, the last queries the model used, in any order; None when no component asked. Where
            several layers read these keys, `G` is the query heads of all of them.
        query_positions: int32 `[B, Q]`, their original positions.
        query_valid: bool `[B, Q]`, False where fewer than `Q` queries have been seen.
        state: named slot state, `[B, H, N]` each.
        layer_idx: index of the layer as transformers counts.
        num_layers: layers of the model.
        scale: what the model multiplies its logits with before the softmax.
        softcap: logit soft-cap of the model, or None.
        attention_sinks: `[H, G]` learned sink logits that take part in each softmax (GPT-OSS), or None.
        rope: rotary embedding, present when a component declared the need ``rope``.
        rope_positions: int32 `[B, H, N]`, the positions that the cached keys are rotated to; equal to `positions`
            unless a policy re-rotates kept keys.
        prompt_length: int `[B]`, tokens of the prompt.
        seen: int `[B]`, tokens seen by the row so far.
        compaction: int `[B]`, how many compactions the row has had (the counter for random numbers).
        budget: int `[B]`, entries per head that the row keeps on average; None outside a compaction.
        extras: what was declared as a need, by name. ``query_statistics``: `query_mean` fp32 `[B, H, G, D]`,
            `query_covariance` fp32 `[B, H, G, D, D]` and `query_count` int `[B]` of the queries without their rotary
            embedding, from position 4 on. ``weights``: `output_projection` `[H, G, Dv, M]`, the rows of the attention's
            output projection that each query head's values meet. ``modality``: `modality` bool `[B, H, N]`, True for
            image tokens.
        heads: which of the model's KV heads these are; None for all of them.
        turned_back: int `[B]`, how far behind its position the key of the row's next token will be rotated; None where
            nobody counts it, and the newest entry says.
        memo: scorers and what they returned for this view, for `kvpolicy.policy.scoring.once`; a changed copy
            (`dataclasses.replace`) begins with none.

    Raises ValueError when `heads` are not as many as the keys have.
    """

    keys: Keys
    values: Values
    positions: Positions
    valid: Mask
    scale: float
    layer_idx: int
    num_layers: int
    prompt_length: Lengths
    seen: Lengths
    compaction: Lengths
    queries: Queries | None = None
    query_positions: Int32[Tensor, "B Q"] | None = None
    query_valid: Bool[Tensor, "B Q"] | None = None
    state: Mapping[str, Tensor] = field(default_factory=lambda: _EMPTY)
    softcap: float | None = None
    attention_sinks: Float[Tensor, "H G"] | None = None
    rope: Rope | None = None
    rope_positions: Positions | None = None
    budget: Lengths | None = None
    extras: Mapping[str, Tensor] = field(default_factory=lambda: _EMPTY)
    heads: HeadSpan | None = None
    turned_back: Lengths | None = None
    memo: list[tuple[Any, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.heads is not None and self.heads.here != self.keys.shape[1]:
            raise ValueError(f"heads says that {self.heads.here} heads are here and keys hold {self.keys.shape[1]}.")

    @property
    def head_span(self) -> HeadSpan:
        """Which of the model's KV heads the `H` heads of the view are."""
        return HeadSpan.whole(self.keys.shape[1]) if self.heads is None else self.heads

    @property
    def shape(self) -> torch.Size:
        """`[B, H, N]`."""
        return self.keys.shape[:3]

    @property
    def device(self) -> torch.device:
        """Device of the keys."""
        return self.keys.device

    def held(self, name: str) -> Tensor:
        """Return the slot state `name`, `[B, H, N]`; raises UnsupportedError where the view holds none of that name."""
        if name not in self.state:
            raise lacking(f"what reads the slot state {name!r}", "it", "`state` with it", asked="`slot_state`")
        return self.state[name]

    def newest(self, count: int) -> Mask:
        """Mark the `count` valid slots with the highest positions of each row and head; bool `[B, H, N]`."""
        newer = self.valid.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
        return self.valid & (newer <= count)

    def oldest(self, count: int) -> Mask:
        """Mark the `count` valid slots with the lowest positions of each row and head; bool `[B, H, N]`."""
        return self.valid & (self.valid.cumsum(-1, dtype=torch.int32) <= count)


def lacking(who: str, what: str, given: str, *, asked: str = "`needs` and `observed_queries`") -> UnsupportedError:
    """Return the error of a component that was handed a view without what it reads.

    Args:
        who: the kind and name of the component, as policy files say it.
        what: what it reads, in words.
        given: what of `CacheView` should hold it.
        asked: members of a component that a cache goes by.
    """
    return UnsupportedError(
        f"{who} needs {what} and the view holds none; give CacheView {given}, as caches do for what {asked} of a "
        "policy's components ask for."
    )


class LazyViews(Sequence[CacheView]):
    """Views that are made when they are asked for and not kept: those of a ragged cache are copies.

    What was scored is kept, so that a view that is made again knows it.
    """

    def __init__(self, make: Callable[[int], CacheView], layers: Sequence[int]) -> None:
        self._make = make
        self._layers = layers
        self._memos: dict[int, list[tuple[Any, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> CacheView: ...
    @overload
    def __getitem__(self, index: slice) -> LazyViews: ...
    def __getitem__(self, index: int | slice) -> CacheView | LazyViews:
        if isinstance(index, slice):
            return LazyViews(self._make, self._layers[index])
        layer = self._layers[index]
        view = self._make(layer)
        object.__setattr__(view, "memo", self._memos.setdefault(layer, view.memo))
        return view
